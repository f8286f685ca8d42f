//! The restore point's object, and the stream of its attachments.

use serde::{Deserialize, Serialize};
use virtward_model::{PointId, RestorePoint};

use crate::{
    error::Result,
    format::{ChunkId, Cursor, Malformed, ObjectId, envelope::Kind, is_chunk_size, names, sealed},
    keys::KeyRing,
};

/// A named piece of data that belongs to a restore point: domain XML, NVRAM, TPM state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attachment {
    /// Name within the restore point.
    pub name: String,
    /// Content.
    pub bytes: Vec<u8>,
}

/// Where the attachments are: one stream cut into chunks of [`ATTACHMENT_CHUNK_BYTES`]. Only ids stand here, because a
/// garbage collector must see what is referenced and not what it is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AttachmentRefs {
    /// Length of the stream.
    pub bytes: u64,
    /// Chunks of the stream.
    pub chunks: Vec<ChunkId>,
}

/// The content of a `points/` object.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PointRecord {
    /// The restore point.
    pub point: RestorePoint,
    /// Its attachments.
    pub attachments: AttachmentRefs,
    /// Writer that made it.
    pub writer: ObjectId,
    /// Epoch of that writer at publication.
    pub epoch: u64,
}

impl PointRecord {
    /// Whether it is what stands under that id, with numbers that can be. Who wrote it held a key, and may not be trusted
    /// for that.
    pub fn check(&self, id: PointId) -> Result<(), Malformed> {
        let AttachmentRefs { bytes, chunks } = &self.attachments;
        let attached =
            *bytes <= ATTACHMENT_BYTES_MAX && bytes.div_ceil(ATTACHMENT_CHUNK_BYTES as u64) == chunks.len() as u64;
        if self.point.id != id || !attached {
            return Err(Malformed("its content contradicts itself"));
        }
        match self.point.disks.iter().all(|disk| is_chunk_size(disk.chunk_bytes)) {
            true => Ok(()),
            false => Err(Malformed("a disk has chunks of an impossible size")),
        }
    }
}

/// Size of an attachment chunk.
pub const ATTACHMENT_CHUNK_BYTES: usize = 1 << 20;
/// Longest stream of attachments.
pub const ATTACHMENT_BYTES_MAX: u64 = 1 << 30;
const ATTACHMENTS_MAX: u32 = 4096;
const STREAM_MAGIC: &[u8] = b"VWAT\x01";

/// Seals a record.
pub fn seal(ring: &KeyRing, record: &PointRecord) -> Result<Vec<u8>> {
    sealed::seal(ring, Kind::Point, &names::point(record.point.id), record)
}

/// Opens the record of a point, from its place or from the trash.
pub fn open(ring: &KeyRing, id: PointId, bytes: &[u8]) -> Result<PointRecord> {
    let name = names::point(id);
    let record: PointRecord = sealed::open(ring, Kind::Point, &name, bytes)?;
    record.check(id).map_err(|e| e.at(name))?;
    Ok(record)
}

/// The stream: a directory of names and lengths, then the contents.
pub fn encode_attachments(attachments: &[Attachment]) -> Vec<u8> {
    let mut out = STREAM_MAGIC.to_vec();
    out.extend_from_slice(&(attachments.len() as u32).to_le_bytes());
    for Attachment { name, bytes } in attachments {
        out.extend_from_slice(&(name.len() as u32).to_le_bytes());
        out.extend_from_slice(name.as_bytes());
        out.extend_from_slice(&(bytes.len() as u64).to_le_bytes());
    }
    attachments.iter().for_each(|a| out.extend_from_slice(&a.bytes));
    out
}

/// Reverses [`encode_attachments`].
pub fn decode_attachments(stream: &[u8]) -> Result<Vec<Attachment>, Malformed> {
    let mut at = Cursor::new(stream);
    at.expect(STREAM_MAGIC, "its attachments do not begin as such")?;
    let count = at.u32()?;
    if count > ATTACHMENTS_MAX {
        return Err(Malformed("it has too many attachments"));
    }
    let mut directory = Vec::new();
    for _ in 0..count {
        let len = at.u32()? as usize;
        let name = std::str::from_utf8(at.take(len)?).map_err(|_| Malformed("the name of an attachment is no text"))?;
        directory.push((name, at.u64()?));
    }
    let mut attachments = Vec::new();
    for (name, len) in directory {
        let len = usize::try_from(len).map_err(|_| Malformed("an attachment is too long"))?;
        attachments.push(Attachment { name: name.into(), bytes: at.take(len)?.to_vec() });
    }
    at.end()?;
    Ok(attachments)
}
