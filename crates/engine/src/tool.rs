//! Helper programs of QEMU (`qemu-nbd`, `qemu-img`) and the operator's hook commands.
//!
//! Every child is bounded in time, killed when its owner is dropped, and killed by the kernel when this process dies
//! (`setpriv --pdeathsig`), so that a SIGKILL leaves no server behind. Paths never pass through a shell.

use std::{
    path::{Path, PathBuf},
    process::Stdio,
    time::{Duration, Instant},
};

use serde::Deserialize;
use tokio::{
    io::AsyncReadExt,
    process::{Child, Command},
};
use virtward_nbd::{Address, Client, Options};

use crate::{Error, Result};

/// Generous: a host whose disks are busy takes its time to open an image.
const START_TIMEOUT: Duration = Duration::from_secs(60);
const INFO_TIMEOUT: Duration = Duration::from_secs(60);
/// What `qemu-img check` ends with.
const CHECK_GOOD: i32 = 0;
const CHECK_CORRUPT: i32 = 2;
const CHECK_LEAKS: i32 = 3;
/// Reads all of an image's tables.
const CHECK_TIMEOUT: Duration = Duration::from_secs(3600);

/// An image served over NBD on a private Unix socket by a `qemu-nbd` of ours.
pub(crate) struct ImageServer {
    child: Child,
    // Holds the socket; removed on drop.
    _dir: tempfile::TempDir,
    socket: PathBuf,
}

impl ImageServer {
    /// Starts the server of an image of our own making, to be written to. Nothing is durable when
    /// it has ended: QEMU's VMDK driver would ask for that after every 64 KiB that it allocates. The caller sees to it.
    pub(crate) async fn start_writable(path: &Path, format: &str) -> Result<Self> {
        let node = serde_json::json!({ "driver": format, "file": file_node(path)?, "discard": "unmap" });
        Self::start_node(&node, path, true, None).await
    }

    /// Starts the server of an image that is described as QEMU's block layer wants it, with a dirty bitmap as a metadata
    /// context. `image` is for people.
    pub(crate) async fn start_node(
        node: &serde_json::Value,
        image: &Path,
        writable: bool,
        bitmap: Option<&str>,
    ) -> Result<Self> {
        let dir = tempfile::Builder::new()
            .prefix("virtward-nbd-")
            .tempdir()
            .map_err(Error::io("create a directory for an NBD socket"))?;
        let socket = dir.path().join("sock");
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "qemu-nbd", "--persistent", "--shared=8"]);
        command.arg("--socket").arg(&socket);
        command.args(if writable { &["--cache=unsafe"][..] } else { &["--cache=writeback", "--read-only"] });
        if let Some(bitmap) = bitmap {
            command.arg("--bitmap").arg(bitmap);
        }
        // A `json:` pseudo file name is immune to commas, colons and leading dashes in paths.
        command.arg(format!("json:{node}"));
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).kill_on_drop(true);
        let child = command.spawn().map_err(Error::io("start qemu-nbd (package qemu-utils)"))?;
        let mut server = Self { child, _dir: dir, socket };
        server.wait_until_listening(image).await?;
        Ok(server)
    }

    async fn wait_until_listening(&mut self, image: &Path) -> Result<()> {
        let deadline = Instant::now() + START_TIMEOUT;
        loop {
            if self.socket.exists() && tokio::net::UnixStream::connect(&self.socket).await.is_ok() {
                return Ok(());
            }
            if let Ok(Some(_)) = self.child.try_wait() {
                let mut text = String::new();
                if let Some(mut stderr) = self.child.stderr.take() {
                    let _ = stderr.read_to_string(&mut text).await;
                }
                return Err(cannot_open(image, &text));
            }
            if Instant::now() > deadline {
                return Err(Error::Tool(format!("qemu-nbd did not begin to serve {} in time", image.display())));
            }
            tokio::time::sleep(Duration::from_millis(3)).await;
        }
    }

    /// Where it listens.
    pub(crate) fn socket(&self) -> &Path {
        &self.socket
    }

    /// Connects a client to the image.
    pub(crate) async fn connect(&self, contexts: Vec<String>) -> Result<Client> {
        let options = Options { contexts, ..Options::default() };
        Client::connect(&Address::Unix(self.socket.clone()), options)
            .await
            .map_err(Error::nbd("connect to the image's NBD server"))
    }

    /// Ends the server whatever becomes of the image; when this returns, it has no file open any more.
    pub(crate) async fn abort(mut self) {
        let _ = self.child.kill().await;
    }

    /// Ends the server after it has closed the image.
    pub(crate) async fn stop(mut self) -> Result<()> {
        if let Some(pid) = self.child.id().and_then(|pid| rustix::process::Pid::from_raw(pid as i32)) {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        }
        match tokio::time::timeout(Duration::from_secs(60), self.child.wait()).await {
            Ok(Ok(status)) if status.success() => Ok(()),
            Ok(Ok(status)) => Err(Error::Tool(format!("qemu-nbd ended with {status}"))),
            Ok(Err(source)) => Err(Error::io("wait for qemu-nbd")(source)),
            Err(_) => Err(Error::Tool("qemu-nbd did not end in time".into())),
        }
    }
}

/// QEMU's words, or, where another process has the image open for writing, what that means.
fn cannot_open(image: &Path, said: &str) -> Error {
    // The file name that QEMU repeats is the whole JSON description.
    let said = said.trim().rsplit_once("}': ").map_or(said.trim(), |(_, reason)| reason);
    if said.contains("lock") && said.contains("another process") {
        return in_use(image);
    }
    Error::Tool(format!("QEMU cannot open {}: {said}", image.display()))
}

/// Somebody else has an image open for writing.
pub(crate) fn in_use(image: &Path) -> Error {
    Error::Busy(format!(
        "{} is in use by another process, probably a running VM; back that up with virtward backup run, or shut it down \
         first",
        image.display()
    ))
}

/// A file or block device as the lowest node of QEMU's block layer.
pub(crate) fn file_node(path: &Path) -> Result<serde_json::Value> {
    let path = absolute(path)?;
    let name = path.to_str().ok_or_else(|| {
        Error::Refused(format!("QEMU cannot open {}: its name is not UTF-8; rename it, or link to it", path.display()))
    })?;
    let driver = if is_block(&path) { "host_device" } else { "file" };
    Ok(serde_json::json!({ "driver": driver, "filename": name }))
}

fn is_block(path: &Path) -> bool {
    use std::os::unix::fs::FileTypeExt;
    std::fs::metadata(path).is_ok_and(|meta| meta.file_type().is_block_device())
}

/// The path as seen from any directory.
pub(crate) fn absolute(path: &Path) -> Result<PathBuf> {
    std::path::absolute(path).map_err(Error::io(format!("resolve {}", path.display())))
}

/// What `qemu-img info` says of one image, as far as it matters here.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct ImageInfo {
    /// Virtual size in bytes.
    #[serde(rename = "virtual-size")]
    pub virtual_size: u64,
    /// Format as opened.
    pub format: String,
    #[serde(rename = "format-specific")]
    specific: Option<FormatSpecific>,
}

#[derive(Clone, Debug, Deserialize)]
struct FormatSpecific {
    data: serde_json::Value,
}

/// A persistent bitmap in an image that nobody has open.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct ImageBitmap {
    pub name: String,
    #[serde(default)]
    pub flags: Vec<String>,
}

impl ImageInfo {
    /// Persistent bitmaps of a qcow2 image.
    pub(crate) fn bitmaps(&self) -> Vec<ImageBitmap> {
        let listed = self.specific.as_ref().and_then(|specific| specific.data.get("bitmaps"));
        listed.and_then(|value| serde_json::from_value(value.clone()).ok()).unwrap_or_default()
    }

    /// Whether the image can hold bitmaps, with the reason if not.
    pub(crate) fn untrackable(&self) -> Option<String> {
        if self.format != "qcow2" {
            return Some(format!("{} images hold no persistent bitmap", self.format));
        }
        let compat = self.specific.as_ref().and_then(|specific| specific.data.get("compat")).and_then(|v| v.as_str());
        match compat {
            Some("0.10") => Some("qcow2 of version 2 (compat=0.10) holds no persistent bitmap".into()),
            _ => None,
        }
    }
}

/// Describes an image without taking its lock.
pub(crate) async fn image_info(path: &Path, format: &str) -> Result<ImageInfo> {
    let mut command = Command::new("qemu-img");
    command.args(["info", "--force-share", "--output=json", "-f", format]).arg(absolute(path)?);
    let text = run(command, INFO_TIMEOUT, &format!("qemu-img info {}", path.display())).await?;
    serde_json::from_str(&text)
        .map_err(|error| Error::Tool(format!("qemu-img info {}: unexpected answer: {error}", path.display())))
}

/// Whether some process, here or (where the file system passes locks on) on another host, has an image open for writing.
pub(crate) async fn is_open_for_writing(path: &Path, format: &str) -> Result<bool> {
    let mut command = Command::new("qemu-img");
    command.args(["info", "--output=json", "-f", format]).arg(absolute(path)?);
    match run(command, INFO_TIMEOUT, &format!("qemu-img info {}", path.display())).await {
        Ok(_) => Ok(false),
        Err(Error::Tool(said)) if said.contains("lock") && said.contains("another process") => Ok(true),
        // Whatever else is wrong with the image is found, and said better, by who reads it.
        Err(Error::Tool(_)) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Checks an image's tables. Leaked clusters are harmless; tables that point nowhere, or past the end, are not.
pub(crate) async fn image_check(path: &Path, node: &serde_json::Value) -> Result<()> {
    let mut command = Command::new("qemu-img");
    command.args(["check", "-q"]).arg(format!("json:{node}"));
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).kill_on_drop(true);
    let mut child = command.spawn().map_err(Error::io("start qemu-img (package qemu-utils)"))?;
    let outcome = tokio::time::timeout(CHECK_TIMEOUT, async {
        let said = first_words(&mut child).await?;
        Ok::<_, std::io::Error>((child.wait().await?, said))
    });
    let what = || format!("qemu-img check {}", path.display());
    let (status, said) = outcome
        .await
        .map_err(|_| Error::Tool(format!("{}: gave no answer in {} s", what(), CHECK_TIMEOUT.as_secs())))?
        .map_err(Error::io(what()))?;
    match status.code() {
        Some(CHECK_GOOD | CHECK_LEAKS) => Ok(()),
        Some(CHECK_CORRUPT) => Err(Error::Refused(format!(
            "{} is damaged or cut short: {}; repair a copy with qemu-img check -r all, or fetch the image again",
            path.display(),
            said.lines().next().unwrap_or_default().trim()
        ))),
        _ => Err(cannot_open(path, &said)),
    }
}

/// The beginning of what a child says on standard error, which is read to its end: a damaged image can have a fault,
/// and a line, for every cluster.
async fn first_words(child: &mut Child) -> std::io::Result<String> {
    const KEPT: usize = 4096;
    let (mut kept, mut buffer) = (Vec::new(), [0; 4096]);
    if let Some(stderr) = &mut child.stderr {
        loop {
            let count = stderr.read(&mut buffer).await?;
            if count == 0 {
                break;
            }
            kept.extend_from_slice(&buffer[..count.min(KEPT - kept.len())]);
        }
    }
    Ok(String::from_utf8_lossy(&kept).into_owned())
}

/// Adds a persistent, recording bitmap to an image that nobody has open.
pub(crate) async fn bitmap_add(path: &Path, name: &str) -> Result<()> {
    bitmap(path, &["--add", "--enable"], name).await
}

/// Removes a bitmap from an image that nobody has open.
pub(crate) async fn bitmap_remove(path: &Path, name: &str) -> Result<()> {
    bitmap(path, &["--remove"], name).await
}

async fn bitmap(path: &Path, action: &[&str], name: &str) -> Result<()> {
    let mut command = Command::new("qemu-img");
    command.arg("bitmap").args(action).args(["-f", "qcow2"]).arg(absolute(path)?).arg(name);
    run(command, INFO_TIMEOUT, &format!("qemu-img bitmap {} {}", action[0], path.display())).await.map(drop)
}

/// Creates an empty image.
pub(crate) async fn image_create(path: &Path, format: &str, options: Option<&str>, size_bytes: u64) -> Result<()> {
    let mut command = Command::new("qemu-img");
    command.args(["create", "-q", "-f", format]);
    if let Some(options) = options {
        command.args(["-o", options]);
    }
    command.arg(absolute(path)?).arg(size_bytes.to_string());
    run(command, INFO_TIMEOUT, &format!("qemu-img create {}", path.display())).await.map(drop)
}

/// Runs a hook command of the operator's through `sh -c`.
pub(crate) async fn hook(command_line: &str, vm: &str, limit: Duration) -> Result<()> {
    let mut command = Command::new("sh");
    command.arg("-c").arg(command_line).env("VIRTWARD_VM", vm);
    run(command, limit, &format!("hook {command_line:?}")).await.map(drop)
}

async fn run(mut command: Command, limit: Duration, what: &str) -> Result<String> {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    let child = command.spawn().map_err(Error::io(what))?;
    let output = tokio::time::timeout(limit, child.wait_with_output())
        .await
        .map_err(|_| Error::Tool(format!("{what}: gave no answer in {} s", limit.as_secs())))?
        .map_err(Error::io(what))?;
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr);
        return Err(Error::Tool(format!("{what}: {} ({})", text.trim(), output.status)));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
