//! Writing one disk of a restore point into an image file or onto a block device.

use std::{
    fs::File,
    io,
    os::unix::fs::{FileExt, FileTypeExt},
    path::Path,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering},
    },
};

use bytes::BytesMut;
use virtward_model::DiskRecord;
use virtward_repo::{DirectFile, DiskReader, Repository, RestoreOptions};

use super::DiskFormat;
use crate::{
    Cancel, Error, Event, Observer, Result,
    image::qcow2::{Qcow2Writer, is_zero},
    job::backup::blocking,
    tool::{self, ImageServer},
};

/// Pieces of a chunk that are tested for zeros on their own, so that a raw file stays sparse.
const PIECE: usize = 64 << 10;

impl DiskFormat {
    /// The format that a file's extension names.
    pub(super) fn of_extension(path: &Path) -> Option<Self> {
        match path.extension()?.to_str()?.to_ascii_lowercase().as_str() {
            "qcow2" => Some(Self::Qcow2),
            "raw" | "img" => Some(Self::Raw),
            "vmdk" => Some(Self::Vmdk),
            "vhdx" => Some(Self::Vhdx),
            "vdi" => Some(Self::Vdi),
            _ => None,
        }
    }

    /// The format of a restored disk whose source had `driver`.
    pub(super) fn of_driver(driver: &str) -> Self {
        match driver {
            "raw" => Self::Raw,
            "vmdk" => Self::Vmdk,
            "vhdx" => Self::Vhdx,
            "vdi" => Self::Vdi,
            _ => Self::Qcow2,
        }
    }

    /// QEMU's name of the format.
    pub fn driver(self) -> &'static str {
        match self {
            Self::Qcow2 => "qcow2",
            Self::Raw => "raw",
            Self::Vmdk | Self::VmdkSplit => "vmdk",
            Self::Vhdx => "vhdx",
            Self::Vdi => "vdi",
        }
    }

    fn create_options(self) -> Option<&'static str> {
        match self {
            Self::VmdkSplit => Some("subformat=twoGbMaxExtentSparse"),
            Self::Vhdx => Some("subformat=dynamic"),
            _ => None,
        }
    }
}

/// One disk to write.
pub(super) struct DiskJob<'a> {
    pub repo: &'a Repository,
    pub record: &'a DiskRecord,
    pub subject: &'a str,
    pub threads: usize,
    pub observer: &'a dyn Observer,
    pub cancel: &'a Cancel,
    /// Bytes done so far over all disks of the job.
    pub done: &'a Arc<AtomicU64>,
}

/// QEMU counts in whole sectors and would cut the rest of a qcow2 image off.
const SECTOR: u64 = 512;
/// QEMU's limit on the first table of a qcow2 image, with the clusters that [`Qcow2Writer`] makes.
const QCOW2_BYTES_MAX: u64 = 2 << 50;

/// Writes the disk to a new file; the bytes written.
pub(super) async fn write_file(job: &DiskJob<'_>, path: &Path, format: DiskFormat) -> Result<u64> {
    let reader = open_reader(job).await?;
    let size = job.record.size_bytes;
    let context = format!("write {}", path.display());
    if format == DiskFormat::Qcow2 && size > QCOW2_BYTES_MAX {
        return Err(Error::Refused(format!(
            "a disk of {size} bytes fits no qcow2 image; restore it with --format raw"
        )));
    }
    match format {
        DiskFormat::Raw => {
            let file = create(path)?;
            file.set_len(size).map_err(Error::io(context.clone()))?;
            let file = Arc::new(DirectFile::new(file));
            let sink = file.clone();
            let written = copy(job, reader, path, move |offset, data| write_sparse(&sink, offset, data)).await?;
            blocking(move || file.sync().map_err(Error::io(context))).await?;
            Ok(written)
        }
        DiskFormat::Qcow2 => {
            let file = create(path)?;
            let (reader, image) = blocking(move || {
                let extents = data_extents(&reader)?;
                let image = Qcow2Writer::begin(file, size.next_multiple_of(SECTOR), extents.into_iter())
                    .map_err(Error::io(context))?;
                Ok((reader, Arc::new(image)))
            })
            .await?;
            let sink = image.clone();
            let written = copy(job, reader, path, move |offset, data| sink.write(offset, data)).await?;
            let context = format!("finish {}", path.display());
            blocking(move || match Arc::try_unwrap(image) {
                Ok(image) => image.finish().map_err(Error::io(context)),
                Err(_) => Err(Error::Tool(format!("{context}: a writer is still at work"))),
            })
            .await?;
            Ok(written)
        }
        other => {
            if other.driver() == "vmdk" && path.file_name().is_some_and(|name| name.as_encoded_bytes().contains(&b'"'))
            {
                return Err(Error::Refused(
                    "a VMDK cannot name itself with a quote in its name; choose another".into(),
                ));
            }
            if other.driver() == "vmdk" && size == 0 {
                return Err(Error::Refused("a disk of no bytes fits no VMDK; choose another format".into()));
            }
            tool::image_create(path, other.driver(), other.create_options(), size).await?;
            let mut written = 0;
            if !job.record.root.is_empty() {
                let server = ImageServer::start_writable(path, other.driver()).await?;
                written = match write_through(&server, job, reader, path).await {
                    Ok(written) => server.stop().await.map(|()| written)?,
                    Err(error) => {
                        server.abort().await;
                        return Err(error);
                    }
                };
            }
            sync_files_beside(path).await?;
            Ok(written)
        }
    }
}

/// Writes the disk through QEMU, which knows the format.
async fn write_through(server: &ImageServer, job: &DiskJob<'_>, reader: DiskReader, path: &Path) -> Result<u64> {
    let client = server.connect(Vec::new()).await?;
    let (sink, runtime) = (client.clone(), tokio::runtime::Handle::current());
    let written = copy(job, reader, path, move |offset, data| {
        // The image is made of whole sectors, and QEMU's servers may take nothing less.
        let mut sectors = BytesMut::zeroed(data.len().next_multiple_of(SECTOR as usize));
        sectors[..data.len()].copy_from_slice(data);
        runtime.block_on(sink.write(offset, sectors.freeze())).map_err(of_server)
    })
    .await?;
    // What waits in QEMU's own caches is written; the files are made durable when it has closed them.
    client.flush().await.map_err(Error::nbd(format!("write {}", path.display())))?;
    client.disconnect().await;
    Ok(written)
}

/// Writes the disk onto a block device, zeros included; the bytes written.
pub(super) async fn write_device(job: &DiskJob<'_>, path: &Path) -> Result<u64> {
    let reader = open_reader(job).await?;
    let size = job.record.size_bytes;
    let (owned, cancel) = (path.to_owned(), job.cancel.clone());
    let device = blocking(move || Ok(Arc::new(zeroed_device(&owned, size, &cancel)?))).await?;
    let sink = device.clone();
    let written = copy(job, reader, path, move |offset, data| sink.write_all_at(data, offset)).await?;
    let context = format!("make {} durable", path.display());
    blocking(move || device.sync_all().map_err(Error::io(context))).await?;
    Ok(written)
}

/// Opens a device that is large enough and that nobody uses, and makes its first `size` bytes read as zeros.
fn zeroed_device(path: &Path, size: u64, cancel: &Cancel) -> Result<File> {
    use std::{io::Seek, os::unix::fs::OpenOptionsExt};
    /// Zeroed between two looks at the cancellation.
    const STEP: u64 = 256 << 20;
    let context = || format!("write {}", path.display());
    // Exclusive: the kernel refuses while the device is mounted or part of a volume group or array.
    let exclusive = rustix::fs::OFlags::EXCL.bits() as i32;
    let opened = File::options().read(true).write(true).custom_flags(exclusive).open(path);
    let device = opened.map_err(|error| match error.kind() {
        io::ErrorKind::ResourceBusy => Error::Busy(format!("{} is mounted or otherwise in use", path.display())),
        _ => Error::io(context())(error),
    })?;
    let capacity = (&device).seek(io::SeekFrom::End(0)).map_err(Error::io(context()))?;
    if capacity < size {
        return Err(Error::Refused(format!("{}: the device has {capacity} bytes, the disk {size}", context())));
    }
    // Devices are zeroed in whole blocks; beyond the disk's end the device belongs to nobody.
    let end = size.next_multiple_of(4096).min(capacity);
    let mut at = 0;
    while at < end {
        if cancel.is_cancelled() {
            return Err(Error::Cancelled);
        }
        let step = STEP.min(end - at);
        zero_range(&device, at, step).map_err(Error::io(format!("zero {}", path.display())))?;
        at += step;
    }
    Ok(device)
}

fn zero_range(device: &File, offset: u64, length: u64) -> io::Result<()> {
    let fast = rustix::fs::fallocate(device, rustix::fs::FallocateFlags::ZERO_RANGE, offset, length);
    if fast.is_ok() {
        return Ok(());
    }
    // Not every device can; any reason that also keeps from writing will show.
    let zeros = vec![0; 1 << 20];
    let mut at = 0;
    while at < length {
        let count = (length - at).min(zeros.len() as u64);
        device.write_all_at(&zeros[..count as usize], offset + at)?;
        at += count;
    }
    Ok(())
}

/// Whether the path is a block device.
pub(super) fn is_device(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|meta| meta.file_type().is_block_device())
}

fn create(path: &Path) -> Result<File> {
    use std::os::unix::fs::OpenOptionsExt;
    // Guest data is nobody else's business; libvirt gives the file to QEMU when the VM starts.
    let options = File::options().read(true).write(true).create_new(true).mode(0o600).open(path);
    options.map_err(Error::io(format!("create {}", path.display())))
}

/// Makes an image durable, with all extents of a split one: whatever is in its directory, which is the restore's own.
async fn sync_files_beside(path: &Path) -> Result<()> {
    let context = format!("make {} durable", path.display());
    let dir = path.parent().unwrap_or(Path::new("/")).to_owned();
    blocking(move || {
        let sync = || {
            for entry in std::fs::read_dir(dir)? {
                File::open(entry?.path())?.sync_all()?;
            }
            Ok(())
        };
        sync().map_err(Error::io(context))
    })
    .await
}

async fn open_reader(job: &DiskJob<'_>) -> Result<DiskReader> {
    let (repo, record) = (job.repo.clone(), job.record.clone());
    blocking(move || Ok(repo.disk(&record)?)).await
}

fn data_extents(reader: &DiskReader) -> Result<Vec<(u64, u64)>> {
    let mut extents = Vec::new();
    for extent in reader.data_extents() {
        let extent = extent?;
        extents.push((extent.offset, extent.bytes));
    }
    Ok(extents)
}

async fn copy(
    job: &DiskJob<'_>,
    reader: DiskReader,
    path: &Path,
    sink: impl Fn(u64, &[u8]) -> io::Result<()> + Send + Sync + 'static,
) -> Result<u64> {
    let written = Arc::new(AtomicU64::new(0));
    let refused = Arc::new(OnceLock::new());
    let (count, done, first) = (written.clone(), job.done.clone(), refused.clone());
    let (threads, cancel) = (job.threads, job.cancel.flag());
    let work = blocking(move || {
        let options = RestoreOptions { threads, cancel: Some(&cancel), ..RestoreOptions::default() };
        reader.copy_to(
            &|offset: u64, data: &[u8]| {
                sink(offset, data).map_err(|error| {
                    let kind = error.kind();
                    let _ = first.set(error);
                    io::Error::from(kind)
                })?;
                count.fetch_add(data.len() as u64, Ordering::Relaxed);
                done.fetch_add(data.len() as u64, Ordering::Relaxed);
                Ok(())
            },
            &options,
        )?;
        Ok(())
    });
    tokio::pin!(work);
    let mut tick = tokio::time::interval(std::time::Duration::from_millis(100));
    loop {
        tokio::select! {
            result = &mut work => match (result, Arc::into_inner(refused).and_then(OnceLock::into_inner)) {
                // The repository would blame itself for a destination that is full.
                (Err(_), Some(error)) => return Err(Error::io(format!("write {}", path.display()))(error)),
                (result, _) => {
                    result?;
                    break;
                }
            },
            _ = tick.tick() => {
                let bytes = job.done.load(Ordering::Relaxed);
                job.observer.event(job.subject, Event::Done { bytes });
            }
        }
    }
    Ok(written.load(Ordering::Relaxed))
}

/// What QEMU failed with, as if the file had been written directly.
fn of_server(error: virtward_nbd::Error) -> io::Error {
    const ENOSPC: u32 = 28;
    match error {
        virtward_nbd::Error::Server { errno: ENOSPC, .. } => io::ErrorKind::StorageFull.into(),
        other => io::Error::other(other),
    }
}

fn write_sparse(file: &DirectFile, offset: u64, data: &[u8]) -> io::Result<()> {
    let mut start = 0;
    let mut pieces = data.chunks(PIECE).peekable();
    let mut at = 0;
    // Neighbouring pieces of data go out in one write.
    while let Some(piece) = pieces.next() {
        let zero = is_zero(piece);
        at += piece.len();
        if zero || pieces.peek().is_none() {
            let end = if zero { at - piece.len() } else { at };
            if end > start {
                file.write_all_at(&data[start..end], offset + start as u64)?;
            }
            start = at;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sparse_writes_lose_nothing() {
        let file = DirectFile::new(tempfile::tempfile().unwrap());
        let mut data = vec![0u8; 5 * PIECE + 100];
        data[PIECE..3 * PIECE].fill(7);
        data[5 * PIECE + 99] = 1;
        file.plain().set_len(data.len() as u64 + 10).unwrap();
        write_sparse(&file, 10, &data).unwrap();
        let mut back = vec![0u8; data.len()];
        file.plain().read_exact_at(&mut back, 10).unwrap();
        assert!(back == data);
    }
}
