//! What an image file consists of and refers to, found out before QEMU opens anything.
//!
//! Headers of images are untrusted: a backing file may be called `nbd://host/secret` or `json:{…}`, a VMDK extent
//! `/etc/shadow`. Here the few header fields that name other files are read, every name must be a plain path of an
//! existing file whose content fits its declared format, and the result is spelt out for QEMU node by node, so that
//! QEMU never follows a name by itself. Every read is bounded.
//!
//! Not here: whether clusters make sense (`qemu-img check` says that), and writing.

use std::{
    fs::File,
    io::Read,
    os::unix::{
        ffi::OsStrExt,
        fs::{FileExt, FileTypeExt, MetadataExt},
    },
    path::{Path, PathBuf},
};

use serde_json::{Value, json};

use super::vmdk;
use crate::{Error, Result, tool};

/// More backing files than this is no chain that anybody made on purpose.
const LINKS_MAX: usize = 64;
/// QEMU's own limit on the name of a backing file.
const NAME_BYTES_MAX: u32 = 1023;
/// The part of a qcow2 header that holds names: one cluster of the largest size.
const QCOW2_HEADER_BYTES_MAX: u64 = 2 << 20;
const QCOW2_DATA_FILE: u64 = 1 << 2;

/// An image with everything below it, top first.
#[derive(Debug)]
pub(crate) struct Chain {
    links: Vec<Link>,
}

/// One image of a chain.
#[derive(Debug)]
struct Link {
    path: PathBuf,
    format: String,
    /// Payload of a qcow2 image that keeps it apart.
    data_file: Option<PathBuf>,
    /// Every file of this image, with what it looked like.
    files: Vec<(PathBuf, Stamp)>,
}

/// Changes whenever anybody writes to the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
}

/// What an image says of others.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct References {
    /// Name and, if declared, format of the image below.
    pub backing: Option<(Vec<u8>, Option<String>)>,
    /// Name of the file with the payload of a qcow2 image.
    pub data_file: Option<Vec<u8>>,
    /// Further files of the image, beside it.
    pub extents: Vec<PathBuf>,
}

impl Chain {
    /// Reads the headers of an image in a format that is known, and of all images below.
    pub(crate) fn inspect(path: &Path, format: &str) -> Result<Self> {
        let mut chain = Self { links: Vec::new() };
        let mut next = Some((tool::absolute(path)?, format.to_owned()));
        while let Some((path, format)) = next.take() {
            if chain.links.len() >= LINKS_MAX {
                return Err(bad(&path, &format!("there are more than {LINKS_MAX} backing files")));
            }
            let stamp = Stamp::of(&path)?;
            if chain.links.iter().any(|link| link.files[0].1.is_same_file(&stamp)) {
                return Err(bad(&path, "it is its own backing file"));
            }
            let references = references(&path, &format)?;
            let mut files = vec![(path.clone(), stamp)];
            for extent in references.extents {
                files.push((extent.clone(), Stamp::of(&extent)?));
            }
            let data_file = references.data_file.map(|name| plain_path(&path, &name, "data file")).transpose()?;
            if let Some(data) = &data_file {
                let stamp =
                    Stamp::of(data).map_err(|error| bad(&path, &format!("its data file is unusable: {error}")))?;
                files.push((data.clone(), stamp));
            }
            if let Some((name, declared)) = references.backing {
                next = Some(backing(&path, &name, declared)?);
            }
            chain.links.push(Link { path, format, data_file, files });
        }
        Ok(chain)
    }

    /// QEMU's description of the image: every node explicit, nothing left for headers to say. With `locked`, QEMU
    /// refuses files that somebody writes to and keeps writers away.
    pub(crate) fn node(&self, locked: bool) -> Result<Value> {
        let mut below = None;
        for link in self.links.iter().rev() {
            let mut node = link.node(locked)?;
            if link.can_have_backing() {
                node["backing"] = below.take().unwrap_or(Value::Null);
            }
            below = Some(node);
        }
        below.ok_or_else(|| Error::Tool("an image chain without an image".into()))
    }

    /// Each image that `qemu-img check` understands, alone.
    pub(crate) fn checkable(&self) -> Result<Vec<(&Path, Value)>> {
        let mut nodes = Vec::new();
        for link in self.links.iter().filter(|link| matches!(&*link.format, "qcow2" | "vmdk" | "vhdx" | "vdi")) {
            let mut node = link.node(true)?;
            if link.can_have_backing() {
                node["backing"] = Value::Null;
            }
            nodes.push((link.path.as_path(), node));
        }
        Ok(nodes)
    }

    /// The image, if it is raw: then it is all there is to read, and needs no QEMU.
    pub(crate) fn raw(&self) -> Option<&Path> {
        self.links.first().filter(|top| top.format == "raw").map(|top| top.path.as_path())
    }

    /// Paths of the backing files.
    pub(crate) fn backing(&self) -> impl Iterator<Item = &Path> {
        self.links.iter().skip(1).map(|link| link.path.as_path())
    }

    /// An error if any file is no longer what it was.
    pub(crate) fn unchanged(&self) -> Result<()> {
        for (path, stamp) in self.links.iter().flat_map(|link| &link.files) {
            if Stamp::of(path)? != *stamp {
                return Err(Error::SourceGone(format!(
                    "{} was written to during the backup; nothing was published",
                    path.display()
                )));
            }
        }
        Ok(())
    }
}

impl Link {
    fn can_have_backing(&self) -> bool {
        matches!(&*self.format, "qcow2" | "vmdk")
    }

    fn node(&self, locked: bool) -> Result<Value> {
        let mut node = json!({ "driver": self.format, "file": tool::file_node(&self.path)? });
        if let Some(data) = &self.data_file {
            node["data-file"] = tool::file_node(data)?;
        }
        if !locked {
            node["force-share"] = true.into();
        }
        Ok(node)
    }
}

impl Stamp {
    fn of(path: &Path) -> Result<Self> {
        let meta = std::fs::metadata(path).map_err(Error::io(format!("look at {}", path.display())))?;
        let kind = meta.file_type();
        // Opening a FIFO would wait for ever.
        if !kind.is_file() && !kind.is_block_device() {
            return Err(Error::Refused(format!("{} is neither a file nor a block device", path.display())));
        }
        Ok(Self {
            device: meta.dev(),
            inode: meta.ino(),
            size: meta.size(),
            // A block device has the time of its node, which says nothing.
            modified: if kind.is_file() { (meta.mtime(), meta.mtime_nsec()) } else { (0, 0) },
        })
    }

    fn is_same_file(&self, other: &Stamp) -> bool {
        (self.device, self.inode) == (other.device, other.inode)
    }
}

/// What the first bytes of a file look like.
pub(crate) fn magic(path: &Path) -> Result<&'static str> {
    Stamp::of(path)?;
    let head = head(path, 512)?;
    let starts = |magic: &[u8]| head.starts_with(magic);
    Ok(match () {
        () if starts(b"QFI\xfb") => "qcow2",
        () if starts(b"KDMV") || starts(b"COWD") || starts(b"# Disk DescriptorFile") => "vmdk",
        () if starts(b"conectix") => "vpc",
        () if starts(b"vhdxfile") => "vhdx",
        () if head.get(64..68) == Some(&[0x7f, 0x10, 0xda, 0xbe]) => "vdi",
        () => "raw",
    })
}

fn references(path: &Path, format: &str) -> Result<References> {
    match format {
        "qcow2" => qcow2(path, &head(path, QCOW2_HEADER_BYTES_MAX)?).map_err(|what| bad(path, &what)),
        "vmdk" => vmdk::references(path),
        "vpc" => vhd(path).map(|()| References::default()),
        "vdi" => vdi(path).map(|()| References::default()),
        _ => Ok(References::default()),
    }
}

/// Where the image below is. It must be there, and be what it is said to be.
fn backing(image: &Path, name: &[u8], declared: Option<String>) -> Result<(PathBuf, String)> {
    let path = plain_path(image, name, "backing file")?;
    let shown = path.display();
    if !path.exists() {
        return Err(bad(
            image,
            &format!("its backing file {shown} is missing; bring it back, or flatten the image there"),
        ));
    }
    let found = magic(&path).map_err(|error| bad(image, &format!("its backing file is unusable: {error}")))?;
    let Some(declared) = declared else {
        return Err(bad(
            image,
            &format!(
                "it does not say of what format its backing file {shown} is, and a guess could be led astray; say it \
                 with: qemu-img rebase -u -F {found} -b {shown} {}",
                image.display()
            ),
        ));
    };
    match &*declared {
        "raw" => Ok((path, declared)),
        "qcow2" | "vmdk" | "vhdx" | "vdi" if found == declared => Ok((path, declared)),
        "vpc" if matches!(found, "vpc" | "raw") => Ok((path, declared)),
        "qcow2" | "vmdk" | "vhdx" | "vdi" | "vpc" => {
            Err(bad(image, &format!("its backing file {shown} should be a {declared} image but looks like {found}")))
        }
        _ => Err(bad(image, &format!("its backing file has the format {declared:?}, which is not read"))),
    }
}

/// A name from a header as a path, if it is nothing but a path.
fn plain_path(image: &Path, name: &[u8], role: &str) -> Result<PathBuf> {
    let shown = String::from_utf8_lossy(name);
    let refuse = |why: &str| {
        bad(
            image,
            &format!("its {role} is called {shown:?}, which {why}; only paths of files on this host are followed"),
        )
    };
    let colon = name.iter().position(|byte| *byte == b':');
    let slash = name.iter().position(|byte| *byte == b'/');
    match (colon, slash) {
        _ if name.is_empty() || name.contains(&0) => return Err(refuse("is no path")),
        // QEMU takes what stands before a colon for a protocol (nbd:, json:, fd:) unless a slash comes first.
        (Some(colon), slash) if slash.is_none_or(|slash| colon < slash) => return Err(refuse("names a protocol")),
        _ => {}
    }
    let path = Path::new(std::ffi::OsStr::from_bytes(name));
    Ok(image.parent().unwrap_or(Path::new("/")).join(path))
}

pub(super) fn bad(image: &Path, what: &str) -> Error {
    Error::Refused(format!("{} cannot be used: {what}", image.display()))
}

pub(super) fn head(path: &Path, bytes: u64) -> Result<Vec<u8>> {
    let mut head = Vec::new();
    let read = File::open(path).and_then(|file| file.take(bytes).read_to_end(&mut head));
    read.map_err(Error::io(format!("read {}", path.display())))?;
    Ok(head)
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..at.checked_add(4)?)?.try_into().ok().map(u32::from_be_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    bytes.get(at..at.checked_add(8)?)?.try_into().ok().map(u64::from_be_bytes)
}

/// The names in a qcow2 header; what is wrong with it otherwise.
fn qcow2(path: &Path, head: &[u8]) -> std::result::Result<References, String> {
    let cut = || "its qcow2 header is cut short".to_owned();
    if !head.starts_with(b"QFI\xfb") {
        return Err("it is no qcow2 image".into());
    }
    let version = u32_at(head, 4).ok_or_else(cut)?;
    if !matches!(version, 2 | 3) {
        return Err(format!(
            "it is qcow version {version}; convert it with: qemu-img convert -O qcow2 {} NEW",
            path.display()
        ));
    }
    if u32_at(head, 32).ok_or_else(cut)? != 0 {
        return Err("it is encrypted; decrypt a copy with qemu-img convert first".into());
    }
    let (features, header_bytes) = match version {
        2 => (0, 72),
        _ => (u64_at(head, 72).ok_or_else(cut)?, u32_at(head, 100).ok_or_else(cut)?),
    };
    let (name_at, name_bytes) = (u64_at(head, 8).ok_or_else(cut)?, u32_at(head, 16).ok_or_else(cut)?);
    let extensions = extensions(head, header_bytes as usize)?;
    let of_type = |wanted: u32| extensions.iter().find(|(kind, _)| *kind == wanted).map(|(_, data)| *data);
    let mut references = References::default();
    if name_at != 0 && name_bytes != 0 {
        let end = name_at.checked_add(u64::from(name_bytes)).filter(|_| name_bytes <= NAME_BYTES_MAX);
        let range = end.and_then(|end| head.get(usize::try_from(name_at).ok()?..usize::try_from(end).ok()?));
        let name = range.ok_or("the name of its backing file is outside of its header")?.to_vec();
        let format = of_type(0xe279_2aca).map(|data| String::from_utf8_lossy(data).into_owned());
        references.backing = Some((name, format));
    }
    if features & QCOW2_DATA_FILE != 0 {
        let name = of_type(0x4441_5441).ok_or("it keeps its data in another file and does not say in which")?;
        references.data_file = Some(name.to_vec());
    }
    Ok(references)
}

fn extensions(head: &[u8], mut at: usize) -> std::result::Result<Vec<(u32, &[u8])>, String> {
    let mut found = Vec::new();
    // QEMU writes up to five; the list ends where the header does.
    while let (Some(kind), Some(length)) = (u32_at(head, at), u32_at(head, at.saturating_add(4))) {
        if kind == 0 || found.len() > 64 {
            break;
        }
        let begin = at + 8;
        let end = begin + length as usize;
        found.push((kind, head.get(begin..end).ok_or("a header extension is longer than the header")?));
        at = begin + (length as usize).next_multiple_of(8);
    }
    Ok(found)
}

/// QEMU reads what is missing at a VHD's end as zeros; its footer tells whether the end is there.
fn vhd(path: &Path) -> Result<()> {
    const FOOTER: usize = 512;
    const DYNAMIC: u32 = 3;
    const DIFFERENCING: u32 = 4;
    let context = || format!("read {}", path.display());
    let file = File::open(path).map_err(Error::io(context()))?;
    let size = file.metadata().map_err(Error::io(context()))?.len();
    let mut footer = [0; FOOTER];
    let at = size.checked_sub(FOOTER as u64).ok_or_else(|| bad(path, "it is too short to be a VHD image"))?;
    file.read_exact_at(&mut footer, at).map_err(Error::io(context()))?;
    // Virtual PC before 2004 wrote 511 bytes.
    let footer = if footer.starts_with(b"conectix") { &footer[..] } else { &footer[1..] };
    if !footer.starts_with(b"conectix") {
        return Err(bad(path, "it does not end with the footer of a VHD image: it is cut short, or no VHD"));
    }
    match u32_at(footer, 60) {
        Some(DIFFERENCING) => Err(bad(path, "it is a differencing VHD; merge it with its parent first")),
        Some(DYNAMIC) if magic(path)? != "vpc" => Err(bad(path, "it has no VHD header")),
        _ => Ok(()),
    }
}

/// Neither opening nor checking a VDI notices that its end is missing.
fn vdi(path: &Path) -> Result<()> {
    let head = head(path, 512)?;
    let field = |at: usize| head.get(at..at + 4)?.try_into().ok().map(u32::from_le_bytes).map(u64::from);
    let (Some(begin), Some(block), Some(blocks)) = (field(0x158), field(0x178), field(0x184)) else {
        return Err(bad(path, "its VDI header is cut short"));
    };
    // At most 2^64 - 2^33 + 1 + 2^32: no overflow.
    let end = begin + block * blocks;
    match Stamp::of(path)?.size < end && magic(path)? == "vdi" {
        true => Err(bad(path, &format!("it is cut short: its blocks end at byte {end}"))),
        false => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_are_not_paths_are_refused() {
        let image = Path::new("/images/a.qcow2");
        for name in ["json:{}", "nbd://h/x", "nbd:unix:/s", "fd:3", "file:base.raw", "", "a\0b", "ssh://h/p"] {
            let error = plain_path(image, name.as_bytes(), "backing file").unwrap_err().to_string();
            assert!(error.contains("/images/a.qcow2") && error.contains("backing file"), "{error}");
        }
        for (name, path) in [("b.raw", "/images/b.raw"), ("/x/b:c", "/x/b:c"), ("./b:c", "/images/./b:c")] {
            assert_eq!(plain_path(image, name.as_bytes(), "backing file").unwrap(), Path::new(path));
        }
    }

    #[test]
    fn no_header_however_damaged_makes_it_panic() {
        let mut head = b"QFI\xfb\0\0\0\x03".to_vec();
        head.resize(4096, 0);
        head[100..104].copy_from_slice(&104u32.to_be_bytes());
        let path = Path::new("/x");
        assert_eq!(qcow2(path, &head).unwrap(), References::default());
        for length in 0..200 {
            let _ = qcow2(path, &head[..length]);
        }
        let mut state = 88_172_645_463_325_252u64;
        for _ in 0..20_000 {
            let mut damaged = head.clone();
            for _ in 0..8 {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                damaged[8 + (state % 120) as usize] = (state >> 32) as u8;
            }
            let _ = qcow2(path, &damaged);
        }
        head[100..104].copy_from_slice(&u32::MAX.to_be_bytes());
        let _ = qcow2(path, &head);
        head[100..104].copy_from_slice(&104u32.to_be_bytes());
        head[104..112].copy_from_slice(&[0xff; 8]);
        assert!(qcow2(path, &head).is_err());
    }
}
