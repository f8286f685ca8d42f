//! The names in a VMDK image: extents and parent, from its descriptor.
//!
//! The descriptor is text of the image's maker. QEMU reads it leniently; here every line must be of a known shape, so
//! that no reading of QEMU's can find a file name that this one missed.

use std::path::{Path, PathBuf};

use super::chain::{References, bad, head};
use crate::Result;

/// Longest descriptor.
const DESCRIPTOR_BYTES_MAX: u64 = 1 << 20;
const SECTOR: u64 = 512;
/// QEMU looks for a parent in this much of an embedded descriptor.
const EMBEDDED_SECTORS: u64 = 20;

/// What the image at `path` refers to.
pub(super) fn references(path: &Path) -> Result<References> {
    let start = head(path, SECTOR)?;
    match start.get(..4) {
        Some(b"KDMV") => {
            let (capacity, at, sectors) =
                sparse_header(&start).ok_or_else(|| bad(path, "its VMDK header is cut short"))?;
            if at == 0 {
                return Ok(References::default());
            }
            let sectors = sectors.clamp(EMBEDDED_SECTORS, DESCRIPTOR_BYTES_MAX / SECTOR);
            let Some(end) = at.checked_add(sectors).and_then(|end| end.checked_mul(SECTOR)) else {
                return Err(bad(path, "its descriptor lies beyond the end of any file"));
            };
            if at > DESCRIPTOR_BYTES_MAX / SECTOR {
                return Err(bad(path, "its descriptor is not where a descriptor is"));
            }
            let bytes = head(path, end)?;
            let text = bytes.get((at * SECTOR) as usize..).unwrap_or_default();
            descriptor(path, text, capacity == 0)
        }
        Some(b"COWD") => Ok(References::default()),
        _ => {
            let text = head(path, DESCRIPTOR_BYTES_MAX)?;
            if !text.starts_with(b"# Disk DescriptorFile") {
                return Err(bad(path, "it is no VMDK image"));
            }
            descriptor(path, &text, true)
        }
    }
}

/// Capacity, and first sector and number of sectors of the embedded descriptor.
fn sparse_header(head: &[u8]) -> Option<(u64, u64, u64)> {
    let field = |at: usize| Some(u64::from_le_bytes(head.get(at..at + 8)?.try_into().ok()?));
    Some((field(12)?, field(28)?, field(36)?))
}

/// `extents` says whether the lines that name extents count; in a monolithic image they name the image itself.
fn descriptor(image: &Path, bytes: &[u8], extents: bool) -> Result<References> {
    let text = bytes.split(|byte| *byte == 0).next().unwrap_or_default();
    let text = String::from_utf8_lossy(text);
    let mut references = References::default();
    for line in text.split(['\n', '\r']).map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#')) {
        if let Some(name) = line.strip_prefix("parentFileNameHint=\"").and_then(|rest| rest.strip_suffix('"')) {
            references.backing = Some((name.as_bytes().to_vec(), Some("vmdk".into())));
        } else if let Some((kind, name)) = extent(line) {
            if extents {
                references.extents.extend(extent_path(image, kind, name)?);
            }
        } else if !is_setting(line) {
            return Err(bad(image, &format!("its descriptor has a line that makes no sense: {line:?}")));
        }
    }
    if extents && references.extents.is_empty() {
        return Err(bad(image, "its descriptor names no extent"));
    }
    Ok(references)
}

/// `RW 4192256 SPARSE "disk-s001.vmdk"` and the like: kind and name.
fn extent(line: &str) -> Option<(&str, &str)> {
    let mut words = line.splitn(4, ' ');
    if !matches!(words.next()?, "RW" | "RDONLY" | "NOACCESS") {
        return None;
    }
    words.next()?.parse::<u64>().ok()?;
    let kind = words.next()?;
    let (name, rest) = words.next().unwrap_or("\"\"").strip_prefix('"')?.split_once('"')?;
    let numbers = rest.trim();
    (numbers.is_empty() || numbers.parse::<u64>().is_ok()).then_some((kind, name))
}

/// `createType="twoGbMaxExtentSparse"`, `ddb.adapterType = "ide"`.
fn is_setting(line: &str) -> bool {
    let Some((key, value)) = line.split_once('=') else { return false };
    let key_fits = key.trim().chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-'));
    // A parent in any other spelling would be seen by QEMU but not here.
    key_fits && !key.contains("parentFileNameHint") && !value.contains("parentFileNameHint")
}

/// Where an extent is: beside its descriptor, or it is not read.
fn extent_path(image: &Path, kind: &str, name: &str) -> Result<Option<PathBuf>> {
    if kind == "ZERO" {
        return Ok(None);
    }
    if name.is_empty() || name.contains('/') || matches!(name, "." | "..") {
        return Err(bad(image, &format!("its extent {name:?} is not a file beside it; only such are followed")));
    }
    let path = image.with_file_name(name);
    if !path.exists() {
        return Err(bad(image, &format!("its extent {} is missing", path.display())));
    }
    // A sparse extent may hold a descriptor of its own, with names of its own.
    let start = head(&path, SECTOR)?;
    match kind {
        "SPARSE" if sparse_header(&start).is_none_or(|(capacity, ..)| capacity == 0) || !start.starts_with(b"KDMV") => {
            Err(bad(image, &format!("its extent {} is damaged or no sparse extent", path.display())))
        }
        "VMFSSPARSE" if !start.starts_with(b"COWD") => {
            Err(bad(image, &format!("its extent {} is damaged or no sparse extent", path.display())))
        }
        "SPARSE" | "VMFSSPARSE" | "FLAT" | "VMFS" => Ok(Some(path)),
        _ => Err(bad(image, &format!("its extent {} is of kind {kind}, which is not read", path.display()))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEAD: &str = "# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\ncreateType=\"monolithicFlat\"\n";

    fn read(lines: &str) -> Result<References> {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("d-flat.vmdk"), "x").unwrap();
        let path = dir.path().join("d.vmdk");
        std::fs::write(&path, format!("{HEAD}{lines}")).unwrap();
        references(&path)
    }

    #[test]
    fn extents_are_files_beside_the_descriptor() {
        let found = read("RW 8 FLAT \"d-flat.vmdk\" 0\nRW 8 ZERO\nddb.adapterType = \"ide\"\n").unwrap();
        assert_eq!(found.extents.len(), 1);
        for lines in [
            "RW 8 FLAT \"/etc/passwd\" 0\n",
            "RW 8 FLAT \"../x\" 0\n",
            "RW 8 FLAT \"gone.vmdk\" 0\n",
            "RW 8 SPARSE \"d-flat.vmdk\"\n",
            "RW 8 SESPARSE \"d-flat.vmdk\"\n",
            "RW\n8\nFLAT\n\"/etc/passwd\" 0\n",
            "RW 8 FLAT \"d-flat.vmdk\" 0\n parentFileNameHint = \"/etc/passwd\"\n",
            "RW 8 FLAT \"d-flat.vmdk\" 0\nx=parentFileNameHint=\"/etc/passwd\"\n",
            "",
        ] {
            assert!(read(lines).is_err(), "{lines}");
        }
    }

    #[test]
    fn a_parent_is_found() {
        let found = read("parentFileNameHint=\"nbd://h/x\"\nRW 8 FLAT \"d-flat.vmdk\" 0\n").unwrap();
        assert_eq!(found.backing, Some((b"nbd://h/x".to_vec(), Some("vmdk".into()))));
    }
}
