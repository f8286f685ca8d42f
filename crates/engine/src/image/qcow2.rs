//! Writes a fresh qcow2 (version 3) image from many threads at once.
//!
//! Layout: header, L1 table, the L2 tables that data needs, data clusters in the order of their writing, refcount table
//! and blocks last, header rewritten at the very end. Until [`Qcow2Writer::finish`] the file has no valid header, so a
//! half-written image is never taken for a whole one.
//!
//! Not here: reading, backing files, snapshots, bitmaps, compression. QEMU does those.

use std::{
    fs::File,
    io,
    os::unix::fs::FileExt,
    sync::atomic::{AtomicU64, Ordering},
};

use virtward_repo::DirectFile;

const CLUSTER_BITS: u32 = 16;
const CLUSTER: u64 = 1 << CLUSTER_BITS;
/// Guest bytes that one L2 table maps.
const L2_REACH: u64 = CLUSTER * (CLUSTER / 8);
const REFCOUNT_BLOCK_ENTRIES: u64 = CLUSTER / 2;
const COPIED: u64 = 1 << 63;
const HEADER_BYTES: u32 = 104;
const MAGIC: u32 = 0x5146_49fb;
const REFCOUNT_ORDER_16_BIT: u32 = 4;

/// An image being written. `write` may be called from any thread, each guest cluster at most once.
pub(crate) struct Qcow2Writer {
    file: DirectFile,
    size: u64,
    l1_offset: u64,
    l1_entries: u64,
    /// Host offset of the L2 table for each part of the guest disk; 0 where no data will come.
    l2: Vec<u64>,
    next_cluster: AtomicU64,
}

impl Qcow2Writer {
    /// Begins an image of `size` bytes in an empty file. `data` names every guest byte range that may be written.
    pub(crate) fn begin(file: File, size: u64, data: impl Iterator<Item = (u64, u64)>) -> io::Result<Self> {
        let parts = size.div_ceil(L2_REACH);
        let l1_entries = parts.max(1);
        let l1_offset = CLUSTER;
        let mut next = 1 + (l1_entries * 8).div_ceil(CLUSTER);
        let mut l2 = vec![0u64; parts as usize];
        for (offset, length) in data {
            if length == 0 {
                continue;
            }
            for part in offset / L2_REACH..=(offset + length - 1) / L2_REACH {
                let slot = l2.get_mut(part as usize).ok_or_else(|| io::Error::other("data beyond the disk's end"))?;
                if *slot == 0 {
                    *slot = next << CLUSTER_BITS;
                    next += 1;
                }
            }
        }
        Ok(Self { file: DirectFile::new(file), size, l1_offset, l1_entries, l2, next_cluster: AtomicU64::new(next) })
    }

    /// Writes guest bytes. `offset` is cluster-aligned; clusters of zeros take no space.
    pub(crate) fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        if !offset.is_multiple_of(CLUSTER) || offset + data.len() as u64 > self.size {
            return Err(io::Error::other("unaligned or out-of-range write to a qcow2 image"));
        }
        let mut entries = Vec::with_capacity(data.len().div_ceil(CLUSTER as usize));
        let clusters: Vec<&[u8]> = data.chunks(CLUSTER as usize).collect();
        let used: Vec<bool> = clusters.iter().map(|cluster| !is_zero(cluster)).collect();
        let count = used.iter().filter(|used| **used).count() as u64;
        let first = self.next_cluster.fetch_add(count, Ordering::Relaxed);
        let mut host = first;
        let mut run_start = 0;
        for index in 0..=clusters.len() {
            let in_use = used.get(index).copied().unwrap_or(false);
            if in_use {
                entries.push((host << CLUSTER_BITS) | COPIED);
                host += 1;
                continue;
            }
            // End of a run of used clusters: guest-contiguous and host-contiguous, so one write.
            if run_start < index {
                let bytes = &data[run_start << CLUSTER_BITS..data.len().min(index << CLUSTER_BITS)];
                self.file.write_all_at(bytes, (host - (index - run_start) as u64) << CLUSTER_BITS)?;
            }
            run_start = index + 1;
            if index < clusters.len() {
                entries.push(0);
            }
        }
        self.map(offset, &entries)
    }

    fn map(&self, offset: u64, entries: &[u64]) -> io::Result<()> {
        let mut cluster = offset >> CLUSTER_BITS;
        let mut rest = entries;
        while !rest.is_empty() {
            let (part, slot) = ((cluster / (CLUSTER / 8)) as usize, cluster % (CLUSTER / 8));
            let here = rest.len().min((CLUSTER / 8 - slot) as usize);
            let (now, later) = rest.split_at(here);
            if now.iter().any(|entry| *entry != 0) {
                let table = self.l2.get(part).copied().unwrap_or(0);
                if table == 0 {
                    return Err(io::Error::other("write outside the announced data ranges"));
                }
                let bytes: Vec<u8> = now.iter().flat_map(|entry| entry.to_be_bytes()).collect();
                self.file.plain().write_all_at(&bytes, table + slot * 8)?;
            }
            cluster += here as u64;
            rest = later;
        }
        Ok(())
    }

    /// An image of `size` bytes that reads as zeros, in an empty file. It need not outlive a power cut: nothing is synced.
    pub(crate) fn empty(file: File, size: u64) -> io::Result<()> {
        Self::begin(file, size, std::iter::empty())?.complete(|_| Ok(()))
    }

    /// Writes tables and header and makes everything durable.
    pub(crate) fn finish(self) -> io::Result<()> {
        self.complete(DirectFile::sync)
    }

    fn complete(self, sync: impl Fn(&DirectFile) -> io::Result<()>) -> io::Result<()> {
        let used = self.next_cluster.load(Ordering::Relaxed);
        let (table_clusters, blocks) = refcount_geometry(used);
        let table_offset = used << CLUSTER_BITS;
        let blocks_offset = table_offset + (table_clusters << CLUSTER_BITS);
        let total = used + table_clusters + blocks;

        let table: Vec<u8> =
            (0..blocks).flat_map(|block| (blocks_offset + (block << CLUSTER_BITS)).to_be_bytes()).collect();
        self.file.plain().write_all_at(&table, table_offset)?;
        let mut written = 0;
        let ones: Vec<u8> = [0u8, 1].repeat(REFCOUNT_BLOCK_ENTRIES as usize);
        for block in 0..blocks {
            let here = (total - written).min(REFCOUNT_BLOCK_ENTRIES);
            self.file.plain().write_all_at(&ones[..here as usize * 2], blocks_offset + (block << CLUSTER_BITS))?;
            written += here;
        }
        self.file.plain().set_len(total << CLUSTER_BITS)?;

        let l1: Vec<u8> =
            self.l2.iter().flat_map(|table| if *table == 0 { 0 } else { table | COPIED }.to_be_bytes()).collect();
        self.file.plain().write_all_at(&l1, self.l1_offset)?;
        sync(&self.file)?;
        self.file.plain().write_all_at(&self.header(table_offset, table_clusters), 0)?;
        sync(&self.file)
    }

    fn header(&self, refcount_table: u64, refcount_clusters: u64) -> Vec<u8> {
        let mut header = Vec::with_capacity(HEADER_BYTES as usize + 8);
        let u32s = |values: &[u32]| values.iter().flat_map(|v| v.to_be_bytes()).collect::<Vec<u8>>();
        header.extend(u32s(&[MAGIC, 3]));
        header.extend(0u64.to_be_bytes()); // no backing file
        header.extend(u32s(&[0, CLUSTER_BITS]));
        header.extend(self.size.to_be_bytes());
        header.extend(u32s(&[0, self.l1_entries as u32]));
        header.extend(self.l1_offset.to_be_bytes());
        header.extend(refcount_table.to_be_bytes());
        header.extend(u32s(&[refcount_clusters as u32, 0]));
        header.extend(0u64.to_be_bytes()); // no snapshots
        header.extend([0u8; 24]); // incompatible, compatible, autoclear features
        header.extend(u32s(&[REFCOUNT_ORDER_16_BIT, HEADER_BYTES]));
        header.extend([0u8; 8]); // end of header extensions
        header
    }
}

/// Clusters of the refcount table and number of refcount blocks that also count themselves.
fn refcount_geometry(used: u64) -> (u64, u64) {
    let (mut table, mut blocks) = (1, 1);
    loop {
        let need_blocks = (used + table + blocks).div_ceil(REFCOUNT_BLOCK_ENTRIES);
        let need_table = (need_blocks * 8).div_ceil(CLUSTER);
        if need_blocks <= blocks && need_table <= table {
            return (table, blocks);
        }
        (table, blocks) = (need_table.max(table), need_blocks.max(blocks));
    }
}

/// Whether every byte is zero.
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    // Comparing with itself shifted by one lets the compiler use the widest compare there is.
    bytes.first().is_none_or(|first| *first == 0 && bytes[..bytes.len() - 1] == bytes[1..])
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    fn image(size: u64, writes: &[(u64, Vec<u8>)]) -> (tempfile::TempDir, std::path::PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.qcow2");
        let file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
        let ranges: Vec<(u64, u64)> = writes.iter().map(|(offset, data)| (*offset, data.len() as u64)).collect();
        let writer = Qcow2Writer::begin(file, size, ranges.into_iter()).unwrap();
        std::thread::scope(|scope| {
            for (offset, data) in writes {
                let writer = &writer;
                scope.spawn(move || writer.write(*offset, data).unwrap());
            }
        });
        writer.finish().unwrap();
        (dir, path)
    }

    fn qemu_img(arguments: &[&str], path: &std::path::Path) -> std::process::Output {
        Command::new("qemu-img").args(arguments).arg(path).output().expect("qemu-img (package qemu-utils)")
    }

    fn content(size: u64, writes: &[(u64, Vec<u8>)]) -> Vec<u8> {
        let mut bytes = vec![0u8; size as usize];
        for (offset, data) in writes {
            bytes[*offset as usize..*offset as usize + data.len()].copy_from_slice(data);
        }
        bytes
    }

    #[test]
    fn qemu_reads_back_what_was_written_and_finds_no_fault() {
        let pattern = |len: usize, salt: u8| (0..len).map(|i| (i / 7) as u8 ^ salt | 1).collect::<Vec<u8>>();
        let mut holed = pattern(1 << 20, 5);
        holed[3 * 65536..7 * 65536].fill(0);
        let size = (1 << 30) + 65536 + 512;
        let writes = vec![
            (0, pattern(1 << 20, 1)),
            (5 << 20, holed),
            ((512 << 20) - 65536, pattern(2 * 65536, 9)),
            ((1 << 30) + 65536, pattern(512, 3)),
        ];
        let (dir, path) = image(size, &writes);
        let check = qemu_img(&["check", "-q", "-f", "qcow2"], &path);
        assert!(check.status.success(), "{}", String::from_utf8_lossy(&check.stdout));
        let raw = dir.path().join("raw");
        let convert = Command::new("qemu-img").args(["convert", "-O", "raw"]).arg(&path).arg(&raw).status().unwrap();
        assert!(convert.success());
        assert!(std::fs::read(&raw).unwrap() == content(size, &writes));
        // Three clusters of data fewer than were handed in: runs of zeros take no space.
        assert!(std::fs::metadata(&path).unwrap().len() < 4 << 20);
    }

    #[test]
    fn an_empty_disk_is_a_valid_image() {
        let (_dir, path) = image(3 << 30, &[]);
        assert!(qemu_img(&["check", "-q", "-f", "qcow2"], &path).status.success());
        assert!(std::fs::metadata(&path).unwrap().len() < 1 << 20);
    }

    #[test]
    fn an_unfinished_image_is_no_image() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("half.qcow2");
        let file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
        let writer = Qcow2Writer::begin(file, 1 << 20, [(0, 65536)].into_iter()).unwrap();
        writer.write(0, &[7u8; 65536]).unwrap();
        drop(writer);
        assert!(!qemu_img(&["info", "-f", "qcow2"], &path).status.success());
    }

    #[test]
    fn refcounts_count_themselves() {
        for used in [1, 100, 32_766, 32_767, 32_768, 1 << 28] {
            let (table, blocks) = refcount_geometry(used);
            assert!(blocks * REFCOUNT_BLOCK_ENTRIES >= used + table + blocks);
            assert!(table * CLUSTER / 8 >= blocks);
        }
    }
}
