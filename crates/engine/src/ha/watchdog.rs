//! The watchdog: what ends this host when nobody says any more that it is well.
//!
//! Either the kernel's `/dev/watchdog`, or a keeper behind a Unix socket, which a lab has for a device. The keeper speaks
//! lines: `arm SECONDS` is answered by `armed SECONDS IDENTITY` (or by what is wrong), `pet` by nothing, `V` by `off`.
//!
//! Invariants: the timeout is set and read back before anybody relies on it. Nothing here pets by itself: no timer, no
//! retry, no pet beyond what opening the device does. [`Watchdog::disarm`] is the only way to stop it; a drop, a panic
//! or a SIGKILL closes it without the magic character, and it goes on counting.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, BufRead, BufReader, Read, Write},
    os::unix::{fs::FileTypeExt, net::UnixStream},
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use serde::{Deserialize, Serialize};

use super::process::words;

/// Longest wait for a keeper's answer to `arm` and `V`.
const KEEPER_LIMIT: Duration = Duration::from_secs(2);
/// What the kernel's own timer calls itself.
const SOFTDOG: &str = "Software Watchdog";
/// The byte that, written last, lets the device be closed without firing.
const MAGIC_CLOSE: &[u8] = b"V";
/// Where the kernel describes its watchdogs.
const CLASS_DIR: &str = "/sys/class/watchdog";

/// What stands behind a watchdog, and so what it survives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Class {
    /// A device of its own: it fires although the kernel hangs, so time alone can be a proof.
    Hardware,
    /// A timer of the kernel (softdog), which dies with it. Needs a fencing device or a storage proof beside it.
    Softdog,
    /// A keeper behind a socket, outside of what it ends.
    Keeper,
}

/// Why there is no armed watchdog, or why a pet did not arrive.
#[derive(Debug, thiserror::Error)]
#[error("watchdog {}: {why}", .path.display())]
pub struct Error {
    path: PathBuf,
    why: String,
}

/// An armed watchdog. Ends this host unless it is petted in time or disarmed.
#[derive(Debug)]
pub struct Watchdog {
    path: PathBuf,
    class: Class,
    identity: String,
    timeout_s: u32,
    line: Line,
}

#[derive(Debug)]
enum Line {
    Device(File),
    Keeper(UnixStream),
}

impl Watchdog {
    /// Opens the device or the keeper's socket at `path`, sets its timeout, and reads back what was set. One that counts
    /// already, since a daemon died, is taken over without a gap.
    pub fn arm(path: &Path, timeout_s: u32) -> Result<Self, Error> {
        let wrong = |why: String| Error { path: path.to_owned(), why };
        if timeout_s == 0 {
            return Err(wrong("a timeout of 0 s would fire at once".into()));
        }
        let kind = fs::metadata(path).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => wrong(
                "there is none; load the driver of the mainboard's watchdog (or softdog), or correct the path".into(),
            ),
            _ => wrong(error.to_string()),
        })?;
        if kind.file_type().is_socket() {
            Self::arm_keeper(path, timeout_s).map_err(wrong)
        } else {
            Self::arm_device(path, timeout_s, Path::new(CLASS_DIR), "wdctl").map_err(wrong)
        }
    }

    fn arm_device(path: &Path, timeout_s: u32, class_dir: &Path, wdctl: &str) -> Result<Self, String> {
        let about = class_dir.join(device_number(path)?);
        let read = |attribute: &str| {
            let file = about.join(attribute);
            let text = fs::read_to_string(&file).map_err(|error| format!("cannot read {}: {error}", file.display()))?;
            Ok::<_, String>(text.trim().to_owned())
        };
        let identity = read("identity")?;
        if read("timeout")? != timeout_s.to_string() {
            set_timeout(path, timeout_s, wdctl)?;
        }
        let device = OpenOptions::new().write(true).open(path).map_err(|error| match error.raw_os_error() {
            Some(code) if code == rustix::io::Errno::BUSY.raw_os_error() => {
                "another program has it open (systemd's RuntimeWatchdogSec=, sbd, watchdogd); it must let go of it"
                    .into()
            }
            _ => format!("cannot open it: {error}"),
        })?;
        let mut armed = Self {
            path: path.to_owned(),
            class: if identity == SOFTDOG { Class::Softdog } else { Class::Hardware },
            identity,
            timeout_s,
            line: Line::Device(device),
        };
        // Some drivers round, some have a fixed timeout: what counts is what the device says, now that it runs.
        let verified = read("timeout").and_then(|set| {
            if set == timeout_s.to_string() {
                return Ok(());
            }
            Err(format!("a timeout of {timeout_s} s was set, but it says {set} s; give a timeout that it can keep"))
        });
        let verified = verified.and_then(|()| match read("state")?.as_str() {
            "active" => Ok(()),
            state => Err(format!("it is {state} although it is open")),
        });
        match verified {
            Ok(()) => Ok(armed),
            Err(why) => match armed.close() {
                Ok(()) => Err(why),
                Err(error) => Err(format!("{why}; and it cannot be stopped: {error}")),
            },
        }
    }

    fn arm_keeper(path: &Path, timeout_s: u32) -> Result<Self, String> {
        let failed = |error: io::Error| format!("the keeper does not answer: {error}");
        let mut stream = UnixStream::connect(path).map_err(failed)?;
        stream.set_read_timeout(Some(KEEPER_LIMIT)).map_err(failed)?;
        stream.set_write_timeout(Some(KEEPER_LIMIT)).map_err(failed)?;
        stream.write_all(format!("arm {timeout_s}\n").as_bytes()).map_err(failed)?;
        let answer = answer(&stream).map_err(failed)?;
        let armed = answer.strip_prefix("armed ").and_then(|rest| rest.split_once(' '));
        let Some((_, identity)) = armed.filter(|(set, _)| *set == timeout_s.to_string()) else {
            return Err(format!("the keeper was asked for {timeout_s} s and says {:?}", words(&answer)));
        };
        // A pet never waits: a keeper that reads no more is one that no pet reaches.
        stream.set_nonblocking(true).map_err(failed)?;
        let identity = words(identity);
        Ok(Self { path: path.to_owned(), class: Class::Keeper, identity, timeout_s, line: Line::Keeper(stream) })
    }

    /// What stands behind it.
    pub fn class(&self) -> Class {
        self.class
    }

    /// What it calls itself, for people.
    pub fn identity(&self) -> &str {
        &self.identity
    }

    /// The timeout that was read back, in seconds.
    pub fn timeout_s(&self) -> u32 {
        self.timeout_s
    }

    /// Gives this host another timeout's length. Never waits. An error means that it may fire.
    pub fn pet(&mut self) -> Result<(), Error> {
        let written = match &mut self.line {
            // Any byte but the magic one.
            Line::Device(device) => device.write_all(b"p"),
            Line::Keeper(stream) => stream.write_all(b"pet\n"),
        };
        written.map_err(|error| Error { path: self.path.clone(), why: format!("a pet did not arrive: {error}") })
    }

    /// Stops it, and verifies that it stopped as far as that can be seen. On an error it goes on counting.
    pub fn disarm(mut self) -> Result<(), Error> {
        self.close().map_err(|why| Error { path: self.path, why })
    }

    fn close(&mut self) -> Result<(), String> {
        let failed = |error: io::Error| format!("it cannot be stopped and goes on counting: {error}");
        match &mut self.line {
            Line::Device(device) => device.write_all(MAGIC_CLOSE).map_err(failed),
            Line::Keeper(stream) => {
                stream.set_nonblocking(false).map_err(failed)?;
                stream.write_all(b"V\n").map_err(failed)?;
                match answer(stream).map_err(failed)?.as_str() {
                    "off" => Ok(()),
                    other => Err(format!("it was told to stop and says {:?}", words(other))),
                }
            }
        }
    }
}

/// One short line of a keeper.
fn answer(stream: &UnixStream) -> io::Result<String> {
    let mut line = String::new();
    BufReader::new(stream.take(256)).read_line(&mut line)?;
    if line.ends_with('\n') { Ok(line.trim_end().to_owned()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
}

/// `watchdog0` for `/dev/watchdog0`, and for `/dev/watchdog`, which is another name of the first.
fn device_number(path: &Path) -> Result<String, String> {
    let path = fs::canonicalize(path).map_err(|error| error.to_string())?;
    match path.file_name().and_then(|name| name.to_str()) {
        Some("watchdog") => Ok("watchdog0".into()),
        Some(name) if name.starts_with("watchdog") => Ok(name.to_owned()),
        _ => Err("this is neither a watchdog device (/dev/watchdog0) nor a keeper's socket".into()),
    }
}

/// Setting a timeout takes an ioctl; `wdctl` is in util-linux, which every Debian and its kin have.
fn set_timeout(path: &Path, timeout_s: u32, wdctl: &str) -> Result<(), String> {
    let mut command = Command::new(wdctl);
    let set = command.arg("--settimeout").arg(timeout_s.to_string()).arg(path).output();
    let output = set.map_err(|error| format!("cannot run wdctl (package util-linux): {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!("a timeout of {timeout_s} s cannot be set: {}", words(&String::from_utf8_lossy(&output.stderr))))
}

#[cfg(test)]
mod tests {
    use std::{
        os::unix::{fs::PermissionsExt, net::UnixListener},
        thread,
    };

    use super::*;

    /// What a kernel shows of one watchdog, as files: this machine has none to spare for tests.
    struct Pretend {
        dir: tempfile::TempDir,
    }

    impl Pretend {
        fn new(identity: &str, timeout: u32) -> Self {
            let this = Self { dir: tempfile::tempdir().unwrap() };
            fs::create_dir(this.dir.path().join("watchdog0")).unwrap();
            for (attribute, value) in [("identity", identity), ("state", "active"), ("timeout", &timeout.to_string())] {
                this.set(attribute, value);
            }
            fs::write(this.device(), "").unwrap();
            this
        }

        fn set(&self, attribute: &str, value: &str) {
            fs::write(self.dir.path().join("watchdog0").join(attribute), format!("{value}\n")).unwrap();
        }

        fn device(&self) -> PathBuf {
            self.dir.path().join("watchdog")
        }

        /// A `wdctl` that sets what it is told, up to a limit.
        fn wdctl(&self, most: u32) -> String {
            let script = self.dir.path().join("wdctl");
            let file = self.dir.path().join("watchdog0/timeout");
            let text = format!("#!/bin/sh\n[ $2 -le {most} ] && echo $2 >{0} || echo {most} >{0}\n", file.display());
            fs::write(&script, text).unwrap();
            fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
            script.to_string_lossy().into_owned()
        }

        fn arm(&self, timeout_s: u32, wdctl: &str) -> Result<Watchdog, String> {
            Watchdog::arm_device(&self.device(), timeout_s, self.dir.path(), wdctl)
        }

        fn written(&self) -> String {
            fs::read_to_string(self.device()).unwrap()
        }
    }

    #[test]
    fn a_device_is_armed_with_a_timeout_that_was_read_back_and_stopped_by_the_magic_close_alone() {
        let kernel = Pretend::new("iTCO_wdt", 30);
        let wdctl = kernel.wdctl(600);
        let mut armed = kernel.arm(10, &wdctl).unwrap();
        assert_eq!((armed.class(), armed.timeout_s(), armed.identity()), (Class::Hardware, 10, "iTCO_wdt"));
        assert_eq!(kernel.written(), "", "armed, and petted by itself");
        armed.pet().unwrap();
        drop(armed);
        assert_eq!(kernel.written(), "p", "a drop must not stop it");
        fs::write(kernel.device(), "").unwrap();
        kernel.arm(10, &wdctl).unwrap().disarm().unwrap();
        assert_eq!(kernel.written(), "V");
        assert_eq!(Pretend::new(SOFTDOG, 10).arm(10, "/nonexistent").unwrap().class(), Class::Softdog);
    }

    #[test]
    fn a_timeout_that_the_device_does_not_keep_is_refused_and_it_is_stopped_again() {
        let kernel = Pretend::new("fixed", 60);
        let wdctl = kernel.wdctl(8);
        let why = kernel.arm(10, &wdctl).unwrap_err();
        assert!(why.contains("it says 8 s"), "{why}");
        assert_eq!(kernel.written(), "V");
        kernel.set("state", "inactive");
        assert!(kernel.arm(8, &wdctl).unwrap_err().contains("inactive"));
        assert!(kernel.arm(9, "/nonexistent").unwrap_err().contains("wdctl"));
    }

    #[test]
    fn what_is_no_watchdog_is_refused() {
        let why = Watchdog::arm(Path::new("/dev/null"), 10).unwrap_err().to_string();
        assert!(why.contains("/dev/null") && why.contains("neither"), "{why}");
        let why = Watchdog::arm(Path::new("/nonexistent/watchdog"), 10).unwrap_err().to_string();
        assert!(why.contains("load the driver"), "{why}");
        assert!(Watchdog::arm(Path::new("/dev/null"), 0).is_err());
    }

    /// A keeper that answers as told and hands back what it heard.
    fn keeper(answers: &'static [&'static str]) -> (tempfile::TempDir, PathBuf, thread::JoinHandle<Vec<String>>) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("watchdog.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let heard = thread::spawn(move || {
            let (stream, _) = listener.accept().unwrap();
            let mut answers = answers.iter();
            let mut heard = Vec::new();
            for line in BufReader::new(&stream).lines().map_while(Result::ok) {
                if line != "pet" {
                    let Some(answer) = answers.next() else { break };
                    let _ = (&stream).write_all(format!("{answer}\n").as_bytes());
                }
                heard.push(line);
            }
            heard
        });
        (dir, path, heard)
    }

    #[test]
    fn a_keeper_is_armed_petted_and_stopped() {
        let (_dir, path, heard) = keeper(&["armed 10 lab keeper", "off"]);
        let mut armed = Watchdog::arm(&path, 10).unwrap();
        assert_eq!((armed.class(), armed.identity()), (Class::Keeper, "lab keeper"));
        armed.pet().unwrap();
        armed.disarm().unwrap();
        assert_eq!(heard.join().unwrap(), ["arm 10", "pet", "V"]);
    }

    #[test]
    fn a_keeper_that_answers_otherwise_or_is_gone_is_an_error() {
        for answers in [&["armed 99 x"][..], &["busy"], &[]] {
            let (_dir, path, _heard) = keeper(answers);
            assert!(Watchdog::arm(&path, 10).is_err(), "{answers:?}");
        }
        let (_dir, path, heard) = keeper(&["armed 10 x"]);
        let mut armed = Watchdog::arm(&path, 10).unwrap();
        armed.line_closed_by_peer(heard);
    }

    impl Watchdog {
        fn line_closed_by_peer(&mut self, heard: thread::JoinHandle<Vec<String>>) {
            // A line without an answer left ends the keeper.
            if let Line::Keeper(stream) = &mut self.line {
                stream.write_all(b"bye\n").unwrap();
            }
            heard.join().unwrap();
            assert!(self.pet().is_err(), "a pet reached a dead keeper");
        }
    }
}
