//! Taking packs apart: the tail and table, and single records.

use super::{
    Entry, Footer, Header, PackInfo, codec,
    layout::{HEADER_BYTES, PACK_BYTES_MAX, TAIL_BYTES, open_table},
};
use crate::{
    crypto::Sealer,
    error::{Error, Result},
    format::Malformed,
    keys::KeyRing,
    pack::PackClass,
    store::Store,
};

/// Reads and checks the tail of a pack. Needs no key.
pub fn read_tail(store: &dyn Store, name: &str, bytes: u64) -> Result<PackInfo> {
    if bytes < (HEADER_BYTES + TAIL_BYTES) as u64 || bytes > PACK_BYTES_MAX {
        return Err(Error::damaged(name, format!("a pack cannot have {bytes} bytes")));
    }
    let mut tail = [0; TAIL_BYTES];
    store.read_range(name, bytes - TAIL_BYTES as u64, &mut tail)?;
    let (header, footer) = Footer::decode(&tail).map_err(|e| e.at(name))?;
    if header.name() != name {
        return Err(Malformed("it belongs to another name").at(name));
    }
    if footer.pack_bytes() != bytes {
        return Err(Malformed("its length does not match its tail").at(name));
    }
    Ok(PackInfo { header, footer })
}

/// Reads and opens the table of a pack.
pub fn read_table(store: &dyn Store, ring: &KeyRing, pack: &PackInfo) -> Result<Vec<Entry>> {
    if pack.header.repository != ring.repository {
        return Err(Malformed("it belongs to another repository").at(pack.name()));
    }
    let Footer { table_offset, table_bytes, .. } = pack.footer;
    let sealed = store.get_range(&pack.name(), table_offset.into(), table_bytes as usize)?;
    open_table(&pack.header, ring, &pack.footer, sealed)
}

/// Opens one record in place, decompresses into `out` and checks that it is what its id says.
pub fn decode_record(
    ring: &KeyRing,
    header: &Header,
    sealer: &Sealer,
    entry: &Entry,
    sealed: &mut [u8],
    out: &mut Vec<u8>,
) -> Result<(), Malformed> {
    let text = sealer.open(u64::from(entry.offset), &entry.aad(header), sealed)?;
    codec::decompress(entry.encoding, text, entry.plain, out)?;
    let id = match header.class {
        PackClass::Data => ring.chunk_id(out),
        PackClass::Meta => ring.page_id(out),
    };
    if id == entry.id { Ok(()) } else { Err(Malformed("a chunk does not hash to its id")) }
}
