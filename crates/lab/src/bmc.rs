//! What a host's mainboard has beside the host: a watchdog, and a controller that switches its power.
//!
//! One process per host, outside of the host's namespaces, from `up` to `down`. It survives power cuts, as a real one
//! does on standby power, and goes on while everything in the host is stopped.
//!
//! `watchdog.sock` takes one connection at a time and speaks lines: `arm SECONDS` is answered by `armed SECONDS NAME`,
//! `pet` by nothing, `V` (the magic close) by `off`. Once armed it counts until it is petted or stopped, also when the
//! connection ends; when the time is over, everything in the host ends, as if its reset button were held down.
//! `bmc.sock` takes `status`, `off` and `on`, one a connection; the lab's fence agent (`fence`) is its client.

use std::{
    fs,
    io::{BufRead, BufReader, ErrorKind, Read, Write},
    os::unix::net::{UnixListener, UnixStream},
    path::PathBuf,
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use rustix::process::Signal;

use crate::{
    host::HostRef,
    names::{HostName, LabName},
    proc,
    run::{output_of, wait_until},
    state::{Host, Lab, write_atomically},
};

/// How often the board looks at its clients and its clock.
const TICK: Duration = Duration::from_millis(25);
/// What the watchdog calls itself.
const NAME: &str = "virtward-lab watchdog";
/// A client of the controller says its word at once.
const CLIENT_LIMIT: Duration = Duration::from_secs(1);

/// Where the host's watchdog is.
pub fn watchdog_socket(lab: &Lab, host: &Host) -> PathBuf {
    lab.host_run_dir(host).join("watchdog.sock")
}

fn socket(lab: &Lab, host: &Host) -> PathBuf {
    lab.host_run_dir(host).join("bmc.sock")
}

fn pid_file(lab: &LabName, host: &HostName) -> PathBuf {
    Lab::run_dir(lab).join(host.as_str()).join("bmc.pid")
}

/// Starts a host's board.
pub fn start(at: HostRef<'_>) -> Result<()> {
    let own = std::env::current_exe().context("cannot find this program's own file")?;
    let path = at.lab.host_var_dir(at.host).join("log/bmc.log");
    let log = fs::File::options().create(true).append(true).open(&path);
    let log = log.with_context(|| format!("cannot write {}", path.display()))?;
    let child = Command::new(own)
        .args(["bmc", at.host.name.as_str(), "--name", at.lab.name.as_str()])
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        .spawn()
        .context("cannot run this program again")?;
    write_atomically(&pid_file(&at.lab.name, &at.host.name), child.id().to_string().as_bytes())?;
    if !wait_until(Duration::from_secs(20), || UnixStream::connect(socket(at.lab, at.host)).is_ok()) {
        bail!("the board of host {} does not start; see {}", at.host.name, path.display());
    }
    Ok(())
}

/// Ends a host's board, if there is one.
pub fn end(lab: &LabName, host: &HostName) {
    let pid = fs::read_to_string(pid_file(lab, host)).ok().and_then(|text| text.trim().parse().ok());
    let words = ["bmc", host.as_str(), "--name", lab.as_str()];
    if let Some(pid) = pid {
        proc::signal_if(pid, Signal::KILL, |pid| proc::has_words(pid, &words));
    }
}

/// Says a word to a host's controller; its answer.
pub fn ask(lab: &Lab, host: &Host, word: &str) -> Result<String> {
    let attempt = || -> std::io::Result<String> {
        let mut stream = UnixStream::connect(socket(lab, host))?;
        stream.write_all(format!("{word}\n").as_bytes())?;
        // Switching on waits until libvirt answers.
        stream.set_read_timeout(Some(Duration::from_secs(90)))?;
        let mut line = String::new();
        BufReader::new(stream).read_line(&mut line)?;
        Ok(line.trim_end().to_owned())
    };
    attempt().with_context(|| format!("the controller of host {} does not answer", host.name))
}

/// The board itself. Returns when the lab is gone.
pub fn serve(lab: &Lab, host: &Host) -> Result<()> {
    rustix::process::setsid().context("cannot leave the session")?;
    let mut board = Board::new(HostRef::new(lab, host))?;
    let path = socket(lab, host);
    while path.exists() {
        board.turn()?;
        thread::sleep(TICK);
    }
    Ok(())
}

struct Board<'a> {
    at: HostRef<'a>,
    watchdog: UnixListener,
    bmc: UnixListener,
    client: Option<(UnixStream, Vec<u8>)>,
    timer: Option<Timer>,
}

/// A watchdog that counts.
struct Timer {
    timeout: Duration,
    petted: Instant,
    /// The power-on that it belongs to: a power cut resets the board.
    power: Option<i32>,
}

impl<'a> Board<'a> {
    fn new(at: HostRef<'a>) -> Result<Self> {
        let listen = |path: PathBuf| {
            let _ = fs::remove_file(&path);
            let listener = UnixListener::bind(&path).with_context(|| format!("cannot listen on {}", path.display()))?;
            listener.set_nonblocking(true).context("cannot listen")?;
            Ok::<_, anyhow::Error>(listener)
        };
        let watchdog = listen(watchdog_socket(at.lab, at.host))?;
        Ok(Self { at, watchdog, bmc: listen(socket(at.lab, at.host))?, client: None, timer: None })
    }

    fn turn(&mut self) -> Result<()> {
        if let Ok((stream, _)) = self.watchdog.accept() {
            self.connect(stream);
        }
        self.listen();
        if let Some(timer) = &self.timer {
            if timer.power != self.at.keeper() {
                self.log("reset by a power cut");
                self.timer = None;
            } else if timer.petted.elapsed() >= timer.timeout {
                self.log(&format!("FIRED: no pet for {} s", timer.timeout.as_secs()));
                (self.timer, self.client) = (None, None);
                self.at.power_off()?;
            }
        }
        if let Ok((stream, _)) = self.bmc.accept() {
            self.obey(stream);
        }
        Ok(())
    }

    fn connect(&mut self, mut stream: UnixStream) {
        if self.client.is_some() {
            let _ = stream.write_all(b"busy\n");
        } else if stream.set_nonblocking(true).is_ok() {
            self.client = Some((stream, Vec::new()));
        }
    }

    /// Reads what the watchdog's client has said.
    fn listen(&mut self) {
        let Some((mut stream, mut heard)) = self.client.take() else { return };
        let mut buffer = [0; 512];
        loop {
            match stream.read(&mut buffer) {
                Ok(0) => return self.log("closed without the magic character; it goes on counting"),
                Ok(count) => heard.extend_from_slice(&buffer[..count]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(_) => return,
            }
            if heard.len() > 4096 {
                return self.log("a client talks without end");
            }
        }
        while let Some(end) = heard.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = heard.drain(..=end).collect();
            let answer = self.hear(String::from_utf8_lossy(&line).trim());
            if answer.is_some_and(|answer| stream.write_all(answer.as_bytes()).is_err()) {
                return;
            }
            if self.timer.is_none() {
                // Stopped: the next line, if any, is another session's.
                return;
            }
        }
        self.client = Some((stream, heard));
    }

    fn hear(&mut self, line: &str) -> Option<String> {
        match line.split_once(' ') {
            None if line == "pet" => {
                if let Some(timer) = &mut self.timer {
                    timer.petted = Instant::now();
                }
                None
            }
            None if line == "V" => {
                self.timer = None;
                self.log("stopped by the magic close");
                Some("off\n".into())
            }
            Some(("arm", seconds)) => match seconds.parse() {
                Ok(seconds @ 1..=3600) => {
                    let timeout = Duration::from_secs(seconds);
                    self.timer = Some(Timer { timeout, petted: Instant::now(), power: self.at.keeper() });
                    self.log(&format!("armed, {seconds} s"));
                    Some(format!("armed {seconds} {NAME}\n"))
                }
                _ => Some("a timeout is 1 to 3600 s\n".into()),
            },
            _ => Some("say arm SECONDS, pet or V\n".into()),
        }
    }

    /// One word for the controller.
    fn obey(&mut self, mut stream: UnixStream) {
        let _ = stream.set_nonblocking(false);
        let _ = stream.set_read_timeout(Some(CLIENT_LIMIT));
        let mut word = String::new();
        if BufReader::new((&stream).take(64)).read_line(&mut word).is_err() || word.is_empty() {
            return;
        }
        let answer = match self.switch(word.trim()) {
            Ok(answer) => answer.to_owned(),
            Err(error) => format!("failed: {error:#}").replace('\n', " "),
        };
        let _ = stream.write_all(format!("{answer}\n").as_bytes());
    }

    fn switch(&mut self, word: &str) -> Result<&'static str> {
        let power = || if self.at.keeper().is_some() { "on" } else { "off" };
        match (word, power()) {
            ("status", power) => Ok(power),
            ("off", _) => {
                self.log("switched off");
                self.at.power_off().map(|()| "ok")
            }
            ("on", "on") => Ok("ok"),
            ("on", _) => {
                self.log("switched on");
                let own = std::env::current_exe().context("cannot find this program's own file")?;
                let (host, lab) = (self.at.host.name.as_str(), self.at.lab.name.as_str());
                let mut command = Command::new(own);
                command.args(["host", "power", "on", host, "--name", lab]);
                output_of(&mut command, None, Duration::from_secs(80)).map(|_| "ok")
            }
            _ => bail!("say status, off or on"),
        }
    }

    fn log(&self, what: &str) {
        eprintln!("{:.3} {}", unix_seconds(), what);
    }
}

fn unix_seconds() -> f64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}
