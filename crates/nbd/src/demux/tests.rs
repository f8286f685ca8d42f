//! Properties of the transmission parser: whatever an honest server does, in whatever pieces it arrives, the answer is
//! right; whatever a dishonest one does, there is an end.

use proptest::prelude::*;

use super::*;

const OFFSET: u64 = 1000;

fn read_request(length: u64) -> Request {
    Request { command: Command::Read, flags: 0, offset: OFFSET, length, payload: Bytes::new(), buffer: BytesMut::new() }
}

fn put_chunk(out: &mut Vec<u8>, framing: Framing, flags: u16, kind: u16, cookie: u64, body: &[u8]) {
    let extended = framing == Framing::Extended;
    out.put_u32(if extended { wire::EXTENDED_REPLY_MAGIC } else { wire::STRUCTURED_REPLY_MAGIC });
    out.put_u16(flags);
    out.put_u16(kind);
    out.put_u64(cookie);
    if extended {
        out.put_u64(OFFSET);
        out.put_u64(body.len() as u64);
    } else {
        out.put_u32(body.len() as u32);
    }
    out.put_slice(body);
}

/// The cookie in an encoded request.
fn cookie_of(header: &[u8]) -> u64 {
    u64::from_be_bytes(header[8..16].try_into().unwrap())
}

/// What a chunk of an honest answer holds: data or nothing, so long.
type Part = (bool, u8, u64);

/// An honest answer to a read, its parts in the order of `keys`, and what is to be read.
fn honest_answer(parts: &[Part], keys: &[u32], framing: Framing, cookie: u64) -> (Vec<u8>, Vec<u8>) {
    let mut expected = Vec::new();
    let mut chunks = Vec::new();
    for ((is_data, byte, length), key) in parts.iter().zip(keys) {
        let at = OFFSET + expected.len() as u64;
        let content = vec![if *is_data { *byte } else { 0 }; *length as usize];
        let mut body = at.to_be_bytes().to_vec();
        if *is_data {
            body.extend(&content);
        } else {
            body.put_u32(*length as u32);
        }
        chunks.push((*key, if *is_data { chunk::OFFSET_DATA } else { chunk::OFFSET_HOLE }, body));
        expected.extend(content);
    }
    chunks.sort_by_key(|chunk| chunk.0);
    let mut wire = Vec::new();
    let last = chunks.len() - 1;
    for (index, (_, kind, body)) in chunks.iter().enumerate() {
        put_chunk(&mut wire, framing, u16::from(index == last), *kind, cookie, body);
    }
    (wire, expected)
}

/// As the shell does it: framing through `pump`, data straight into the sink.
fn feed(demux: &mut Demux<u8>, wire: &[u8], sizes: &[usize]) -> Result<Vec<Completion<u8>>, Violation> {
    let (mut rest, mut input, mut done) = (wire, BytesMut::new(), Vec::new());
    for size in sizes.iter().cycle() {
        while let Some(completion) = demux.pump(&mut input)? {
            done.push(completion);
        }
        if rest.is_empty() {
            return Ok(done);
        }
        let size = (*size).min(rest.len());
        match demux.sink() {
            Some(sink) => {
                let count = match sink {
                    Sink::Append(mut buffer) => {
                        let count = size.min(buffer.remaining_mut());
                        buffer.put_slice(&rest[..count]);
                        count
                    }
                    Sink::Fill(buffer) => {
                        let count = size.min(buffer.len());
                        buffer[..count].copy_from_slice(&rest[..count]);
                        count
                    }
                };
                rest = &rest[count..];
                done.extend(demux.received(count));
            }
            None => {
                input.extend_from_slice(&rest[..size]);
                rest = &rest[size..];
            }
        }
    }
    Ok(done)
}

fn framings() -> impl Strategy<Value = Framing> {
    prop_oneof![Just(Framing::Structured), Just(Framing::Extended)]
}

proptest! {
    #[test]
    fn an_honest_read_is_right_in_any_order_and_any_pieces(
        parts in prop::collection::vec((any::<bool>(), 1u8.., 1u64..300), 1..12),
        keys in prop::collection::vec(any::<u32>(), 12),
        sizes in prop::collection::vec(1usize..400, 1..10),
        framing in framings(),
    ) {
        let length = parts.iter().map(|part| part.2).sum();
        let mut demux = Demux::new(framing, vec![]);
        let mut header = BytesMut::new();
        demux.submit(read_request(length), 9, &mut header);
        let (wire, expected) = honest_answer(&parts, &keys, framing, cookie_of(&header));
        let mut done = feed(&mut demux, &wire, &sizes).unwrap();
        prop_assert_eq!(done.len(), 1);
        let completion = done.remove(0);
        prop_assert_eq!(completion.token, 9);
        match completion.result {
            Ok(Outcome::Data(data)) => prop_assert_eq!(&data[..], &expected[..]),
            other => prop_assert!(false, "{:?}", other),
        }
        prop_assert_eq!(demux.in_flight(), 0);
        // The same answer once more is an answer to nobody.
        prop_assert!(feed(&mut demux, &wire, &sizes).is_err());
    }

    #[test]
    fn an_answer_that_is_cut_off_leaves_the_request_in_flight(
        parts in prop::collection::vec((any::<bool>(), 1u8.., 1u64..60), 1..5),
        cut in 0.0f64..1.0,
        framing in framings(),
    ) {
        let length = parts.iter().map(|part| part.2).sum();
        let mut demux = Demux::new(framing, vec![]);
        let mut header = BytesMut::new();
        demux.submit(read_request(length), 1, &mut header);
        let (wire, _) = honest_answer(&parts, &[0; 12], framing, cookie_of(&header));
        let kept = (wire.len() as f64 * cut) as usize;
        prop_assert!(feed(&mut demux, &wire[..kept], &[64]).unwrap().is_empty());
        let (request, token) = demux.into_requests().next().unwrap();
        prop_assert_eq!((request.offset, request.length, token), (OFFSET, length, 1));
    }

    #[test]
    fn one_flipped_byte_never_gives_a_read_of_another_length(
        parts in prop::collection::vec((any::<bool>(), 1u8.., 1u64..60), 1..5),
        place in any::<prop::sample::Index>(),
        flip in 1u8..,
        framing in framings(),
    ) {
        let length = parts.iter().map(|part| part.2).sum();
        let mut demux = Demux::new(framing, vec![]);
        let mut header = BytesMut::new();
        demux.submit(read_request(length), 1, &mut header);
        let (mut wire, _) = honest_answer(&parts, &[0; 12], framing, cookie_of(&header));
        let place = place.index(wire.len());
        wire[place] ^= flip;
        for completion in feed(&mut demux, &wire, &[7]).unwrap_or_default() {
            if let Ok(Outcome::Data(data)) = completion.result {
                prop_assert_eq!(data.len() as u64, length);
            }
        }
    }

    #[test]
    fn extents_come_back_as_they_were_sent(
        pairs in prop::collection::vec((1u64..1000, 0u64..4), 1..50),
        overhang in 0u64..500,
        framing in framings(),
        wide in any::<bool>(),
    ) {
        let wide = wide && framing == Framing::Extended;
        let length: u64 = pairs.iter().map(|pair| pair.0).sum();
        let mut demux = Demux::new(framing, vec![5]);
        let mut header = BytesMut::new();
        let request = Request { command: Command::BlockStatus, ..read_request(length) };
        demux.submit(request, 1, &mut header);
        let mut sent = pairs.clone();
        sent.last_mut().unwrap().0 += overhang;
        let mut body = 5u32.to_be_bytes().to_vec();
        if wide {
            body.put_u32(sent.len() as u32);
        }
        for (length, flags) in sent {
            if wide {
                body.put_u64(length);
                body.put_u64(flags);
            } else {
                body.put_u32(length as u32);
                body.put_u32(flags as u32);
            }
        }
        let kind = if wide { chunk::BLOCK_STATUS_EXT } else { chunk::BLOCK_STATUS };
        let mut wire = Vec::new();
        put_chunk(&mut wire, framing, 1, kind, cookie_of(&header), &body);
        match feed(&mut demux, &wire, &[100]).unwrap().remove(0).result {
            Ok(Outcome::Extents(extents)) => prop_assert_eq!(&extents[..], &[pairs]),
            other => prop_assert!(false, "{:?}", other),
        }
    }

    #[test]
    fn garbage_ends_in_an_answer_an_error_or_the_wish_for_more(data in prop::collection::vec(any::<u8>(), 0..2000)) {
        crate::fuzz::wire(&data);
    }

    /// Garbage with real magic numbers and cookies in it gets further.
    #[test]
    fn near_garbage_as_well(
        chunks in prop::collection::vec(
            (0u16..2, prop_oneof![0u16..7, 0x8001u16..0x8004], 0u64..5, prop::collection::vec(any::<u8>(), 0..40)),
            0..20,
        ),
        offset in 120u64..200,
        extended in any::<bool>(),
        step in 0u8..4,
    ) {
        let framing = if extended { Framing::Extended } else { Framing::Structured };
        let mut wire = vec![(if extended { 3 } else { 2 }) | step << 2];
        for (flags, kind, slot, mut body) in chunks {
            if let Some(place) = body.first_chunk_mut::<8>() {
                *place = offset.to_be_bytes();
            }
            put_chunk(&mut wire, framing, flags, kind, 1 << 32 | slot, &body);
        }
        crate::fuzz::wire(&wire);
    }
}

#[test]
fn slots_are_used_again_but_cookies_are_not() {
    let mut demux = Demux::new(Framing::Structured, vec![]);
    let mut cookies = std::collections::BTreeSet::new();
    for _ in 0..100 {
        let mut header = BytesMut::new();
        demux.submit(read_request(8), 0, &mut header);
        let cookie = cookie_of(&header);
        assert!(cookies.insert(cookie));
        let (wire, _) = honest_answer(&[(true, 1, 8)], &[0], Framing::Structured, cookie);
        assert_eq!(feed(&mut demux, &wire, &[1000]).unwrap().len(), 1);
    }
    assert_eq!(demux.slots.len(), 1);
}
