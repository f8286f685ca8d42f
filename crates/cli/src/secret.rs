//! The password or key of the repository: read from a file, from a person, or made by `repo init`.
//!
//! Never from the command line (every user of the host sees it) and never from an environment variable's value. Secrets
//! are wiped from memory when they are dropped, as far as that is in our hands.

use std::{
    fs,
    io::{self, Read, Write},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use rustix::termios::{self, LocalModes, OptionalActions, SpecialCodeIndex, Termios};
use virtward_repo::Secret;
use zeroize::Zeroizing;

use crate::{
    app::App,
    config::SecretSource,
    exit::{Failure, Kind},
    out,
};

/// Longest password or key file that makes sense.
const LONGEST: u64 = 1 << 20;

/// A secret and, for messages, where it came from.
pub struct Found {
    /// The secret.
    pub secret: Secret,
    /// `the password in FILE`, `the key in FILE`, `the password typed`.
    pub origin: String,
    /// It was only tried because it lay in the default place.
    pub by_default: bool,
}

/// The secret for an existing repository.
pub fn find(app: &App) -> Result<Found, Failure> {
    match &app.settings.secret {
        SecretSource::PasswordFile(path) => password_file(app, path),
        SecretSource::KeyFile(path) => key_file(app, path),
        SecretSource::Default(path) if path.exists() => {
            key_file(app, path).map(|found| Found { by_default: true, ..found })
        }
        SecretSource::Default(_) if out::can_ask() => typed(&format!("Password of {}: ", app.settings.repo)),
        SecretSource::Default(path) => Err(Failure::new(
            Kind::WrongSecret,
            format!(
                "no password or key for the repository {} was given, and {} does not exist",
                app.settings.repo,
                path.display()
            ),
        )
        .hint("name one with --password-file or --key-file, or run on a terminal to be asked")),
    }
}

/// Whether a secret was named or lies in the default place, so that nobody has to be asked.
pub fn is_at_hand(app: &App) -> bool {
    match &app.settings.secret {
        SecretSource::PasswordFile(_) | SecretSource::KeyFile(_) => true,
        SecretSource::Default(path) => path.exists(),
    }
}

/// Asks a person for the password of an existing repository.
pub fn typed(prompt: &str) -> Result<Found, Failure> {
    let password = ask(prompt)?;
    Ok(Found { secret: Secret::password(password.as_str()), origin: "the password typed".into(), by_default: false })
}

/// Asks for a new password twice; none if the first answer is empty.
pub fn new_password(prompt: &str) -> Result<Option<Secret>, Failure> {
    let first = ask(prompt)?;
    if first.is_empty() {
        return Ok(None);
    }
    let second = ask("The same again: ")?;
    if *first != *second {
        return Err(Failure::new(Kind::Usage, "the two passwords differ").hint("nothing was changed; try again"));
    }
    Ok(Some(Secret::password(first.as_str())))
}

/// The first line of a file as a password.
pub fn password_file(app: &App, path: &Path) -> Result<Found, Failure> {
    let data = read(app, path, "password")?;
    let line = data.split(|byte| *byte == b'\n').next().unwrap_or_default();
    let line = line.strip_suffix(b"\r").unwrap_or(line);
    let text = std::str::from_utf8(line)
        .map_err(|_| Failure::new(Kind::Usage, format!("the password in {} is not valid UTF-8", path.display())))?;
    if text.is_empty() {
        return Err(Failure::new(Kind::Usage, format!("the first line of {} is empty", path.display()))
            .hint("the password is the first line of that file"));
    }
    let origin = format!("the password in {}", path.display());
    Ok(Found { secret: Secret::password(text), origin, by_default: false })
}

/// A whole file as a key.
pub fn key_file(app: &App, path: &Path) -> Result<Found, Failure> {
    let data = read(app, path, "key")?;
    let origin = format!("the key in {}", path.display());
    Ok(Found { secret: Secret::key_bytes(data.to_vec())?, origin, by_default: false })
}

fn read(app: &App, path: &Path, what: &str) -> Result<Zeroizing<Vec<u8>>, Failure> {
    let wrong = |error: io::Error| {
        Failure::io(format!("cannot read the {what} file {}", path.display()))(error)
            .hint("name the right file with --password-file or --key-file, in the environment or in the configuration")
    };
    let file = fs::File::open(path).map_err(wrong)?;
    let meta = file.metadata().map_err(wrong)?;
    if meta.is_file() && meta.mode() & 0o077 != 0 {
        app.progress.warn(&format!(
            "{} can be read by others (mode {:o}); chmod 600 it",
            path.display(),
            meta.mode() & 0o777
        ));
    }
    let mut data = Zeroizing::new(Vec::new());
    file.take(LONGEST + 1).read_to_end(&mut data).map_err(wrong)?;
    if data.len() as u64 > LONGEST {
        return Err(Failure::new(Kind::Usage, format!("{} is too long to be a {what} file", path.display())));
    }
    Ok(data)
}

/// A key file that was just made; removed again unless it is kept.
pub struct NewKeyFile {
    path: PathBuf,
    kept: bool,
}

impl NewKeyFile {
    /// Makes a file with a fresh random key, readable by its owner only. Never overwrites; the key is on the disk, not
    /// only in its cache, before this returns, because a repository that outlives its key is lost.
    pub fn create(path: &Path) -> Result<(Self, Secret), Failure> {
        let context = || format!("cannot create the key file {}", path.display());
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        fs::create_dir_all(parent).map_err(Failure::io(context()))?;
        let mut random = Zeroizing::new([0_u8; 32]);
        fs::File::open("/dev/urandom")
            .and_then(|mut file| file.read_exact(&mut *random))
            .map_err(Failure::io("cannot read /dev/urandom"))?;
        let text = Zeroizing::new(random.iter().map(|byte| format!("{byte:02x}")).collect::<String>() + "\n");
        let mut file = fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path)
            .map_err(Failure::io(context()))?;
        let made = Self { path: path.to_owned(), kept: false };
        file.write_all(text.as_bytes()).and_then(|()| file.sync_all()).map_err(Failure::io(context()))?;
        fs::File::open(parent).and_then(|dir| dir.sync_all()).map_err(Failure::io(context()))?;
        Ok((made, Secret::key_bytes(text.as_bytes().to_vec())?))
    }

    /// The key opens something now: the file stays.
    pub fn keep(mut self) {
        self.kept = true;
    }
}

impl Drop for NewKeyFile {
    fn drop(&mut self) {
        if !self.kept {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Asks on the terminal without showing what is typed. Ctrl-C cancels; the terminal is put back either way, which is
/// why the keys are handled here one by one instead of leaving signals to arrive in the middle.
fn ask(prompt: &str) -> Result<Zeroizing<String>, Failure> {
    let failed = |error: rustix::io::Errno| {
        Failure::new(Kind::Other, format!("cannot ask for a password on this terminal: {error}"))
            .hint("name a file with --password-file")
    };
    let stdin = io::stdin();
    let before = termios::tcgetattr(&stdin).map_err(failed)?;
    let mut raw = before.clone();
    raw.local_modes.remove(LocalModes::ECHO | LocalModes::ICANON | LocalModes::ISIG);
    raw.special_codes[SpecialCodeIndex::VMIN] = 1;
    raw.special_codes[SpecialCodeIndex::VTIME] = 0;
    let _ = write!(io::stderr(), "{prompt}");
    let _ = io::stderr().flush();
    termios::tcsetattr(&stdin, OptionalActions::Now, &raw).map_err(failed)?;
    let _restore = Restore(&before);
    let answer = keys(&mut stdin.lock());
    let _ = writeln!(io::stderr());
    answer
}

struct Restore<'a>(&'a Termios);

impl Drop for Restore<'_> {
    fn drop(&mut self) {
        let _ = termios::tcsetattr(io::stdin(), OptionalActions::Now, self.0);
    }
}

/// Reads one line key by key: backspace, Ctrl-U, Ctrl-C and Ctrl-D mean what they usually mean.
fn keys(input: &mut impl Read) -> Result<Zeroizing<String>, Failure> {
    // Reserved at once, so that growing leaves no copies behind.
    let mut line = Zeroizing::new(Vec::with_capacity(4096));
    let cancelled = || Failure::new(Kind::Cancelled, "cancelled");
    let mut key = [0_u8];
    loop {
        match input.read(&mut key) {
            Ok(0) if line.is_empty() => return Err(cancelled()),
            Ok(0) => break,
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(Failure::io("cannot read the password from the terminal")(error)),
        }
        match key[0] {
            b'\r' | b'\n' => break,
            0x03 => return Err(cancelled()),
            0x04 if line.is_empty() => return Err(cancelled()),
            0x04 => break,
            0x15 => line.clear(),
            0x7f | 0x08 => {
                // One character, which may be several bytes.
                while line.pop().is_some_and(|byte| byte & 0xc0 == 0x80) {}
            }
            byte if line.len() < 4096 => line.push(byte),
            _ => return Err(Failure::new(Kind::Usage, "the password is too long")),
        }
    }
    match std::str::from_utf8(&line) {
        Ok(text) => Ok(Zeroizing::new(text.to_owned())),
        Err(_) => Err(Failure::new(Kind::Usage, "the password is not valid UTF-8")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn typing(keys_typed: &[u8]) -> Result<String, Kind> {
        keys(&mut &keys_typed[..]).map(|line| line.to_string()).map_err(|failure| failure.kind)
    }

    #[test]
    fn keys_do_what_they_do_in_a_shell() {
        assert_eq!(typing(b"secret\n").unwrap(), "secret");
        assert_eq!(typing(b"secrex\x7ft\r").unwrap(), "secret");
        assert_eq!(typing("sü\x7fecret\n".as_bytes()).unwrap(), "secret");
        assert_eq!(typing(b"wrong\x15right\n").unwrap(), "right");
        assert_eq!(typing(b"end\x04").unwrap(), "end");
        assert_eq!(typing(b"\n").unwrap(), "");
        assert_eq!(typing(b"abc\x03"), Err(Kind::Cancelled));
        assert_eq!(typing(b""), Err(Kind::Cancelled));
        assert_eq!(typing(&[b'a'; 5000]), Err(Kind::Usage));
        assert_eq!(typing(b"\xff\n"), Err(Kind::Usage));
    }

    #[test]
    fn a_key_file_is_private_never_overwritten_and_goes_with_a_failed_init() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("deep/repo.key");
        drop(NewKeyFile::create(&path).unwrap());
        assert!(!path.exists());
        NewKeyFile::create(&path).unwrap().0.keep();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        let before = fs::read(&path).unwrap();
        assert_eq!(NewKeyFile::create(&path).err().map(|failure| failure.kind), Some(Kind::Refused));
        assert_eq!(fs::read(&path).unwrap(), before);
    }
}
