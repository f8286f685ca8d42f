//! Standard output carries results and nothing else; standard error carries everything else. Neither panics when the
//! reader has gone away: a result that nobody wants is dropped, any other failure to print it is an error.

use std::io::{self, IsTerminal, Write};

use serde::Serialize;

use crate::exit::{Failure, Kind};

/// Writes bytes to standard output.
pub fn bytes(data: &[u8]) -> Result<(), Failure> {
    let mut stdout = io::stdout().lock();
    match stdout.write_all(data).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(Failure::new(Kind::of_io(&error), format!("cannot write the result to standard output: {error}")))
        }
        _ => Ok(()),
    }
}

/// Writes text to standard output.
pub fn text(text: &str) -> Result<(), Failure> {
    bytes(text.as_bytes())
}

/// Writes one JSON document and a newline to standard output.
pub fn json(value: &impl Serialize) -> Result<(), Failure> {
    let mut line = serde_json::to_vec(value)
        .map_err(|error| Failure::new(Kind::Other, format!("cannot write the result as JSON: {error}")))?;
    line.push(b'\n');
    bytes(&line)
}

/// Writes one line to standard error; nobody can be told if that fails.
pub fn note(line: &str) {
    let _ = writeln!(io::stderr().lock(), "{line}");
}

/// Whether standard output is a terminal.
pub fn stdout_is_terminal() -> bool {
    io::stdout().is_terminal()
}

/// Whether a person can be asked: both sides of the conversation are a terminal.
pub fn can_ask() -> bool {
    io::stdin().is_terminal() && io::stderr().is_terminal()
}
