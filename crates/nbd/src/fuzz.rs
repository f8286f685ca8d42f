//! Entry points that feed arbitrary bytes to the parsers, for the fuzz target and for the property tests alike.

use bytes::{Bytes, BytesMut};

use crate::demux::{Demux, Request};
use crate::handshake::{Goal, Handshake, Progress};
use crate::wire::{Command, Framing};

/// Plays the server's part with `data`: a handshake, or the transmission phase in one of the three framings, in pieces
/// of several sizes. Whatever the bytes are, the parsers end with an answer, an error, or the wish for more. So does that of
/// addresses.
pub fn wire(data: &[u8]) {
    if let Ok(text) = std::str::from_utf8(data) {
        let _ = crate::Address::parse_uri(text);
    }
    let Some((&first, data)) = data.split_first() else { return };
    let step = [1, 3, 17, 4096][usize::from(first >> 2) % 4];
    match first & 3 {
        0 => handshake(data, step),
        1 => transmission(data, step, Framing::Simple),
        2 => transmission(data, step, Framing::Structured),
        _ => transmission(data, step, Framing::Extended),
    }
}

fn handshake(data: &[u8], step: usize) {
    let contexts = vec!["base:allocation".to_string()];
    let goals = [Goal::Export { name: "x".into(), contexts, framing: Framing::Extended }, Goal::List];
    for goal in goals {
        let (mut input, mut output) = (BytesMut::new(), BytesMut::new());
        let mut handshake = Handshake::new(goal);
        for piece in data.chunks(step) {
            input.extend_from_slice(piece);
            match handshake.step(&mut input, &mut output) {
                Ok(Progress::More) => {}
                Ok(_) | Err(_) => break,
            }
        }
    }
}

fn transmission(data: &[u8], step: usize, framing: Framing) {
    const LENGTH: u64 = 64;
    let mut demux = Demux::new(framing, vec![1, 7]);
    let mut headers = BytesMut::new();
    // The cookies are 1 << 32 and up, so that a fuzzer finds them quickly.
    for command in [Command::Read, Command::BlockStatus, Command::Write, Command::Read] {
        let request =
            Request { command, flags: 0, offset: 128, length: LENGTH, payload: Bytes::new(), buffer: BytesMut::new() };
        demux.submit(request, command, &mut headers);
    }
    let mut input = BytesMut::new();
    for piece in data.chunks(step) {
        input.extend_from_slice(piece);
        loop {
            match demux.pump(&mut input) {
                Ok(None) => break,
                Err(_) => return,
                Ok(Some(done)) => {
                    if let Ok(crate::demux::Outcome::Data(data)) = done.result {
                        assert_eq!(data.len() as u64, LENGTH);
                    }
                    assert_eq!(done.token, done.request.command);
                }
            }
        }
    }
}
