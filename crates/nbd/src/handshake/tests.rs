//! The handshake against a scripted server, byte by byte.

use super::*;

fn greeting(flags: u16) -> Vec<u8> {
    let mut out = Vec::new();
    out.put_u64(wire::NBD_MAGIC);
    out.put_u64(wire::OPTION_MAGIC);
    out.put_u16(flags);
    out
}

fn answer(option: u32, kind: u32, data: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    out.put_u64(wire::OPTION_REPLY_MAGIC);
    out.put_u32(option);
    out.put_u32(kind);
    out.put_u32(data.len() as u32);
    out.put_slice(data);
    out
}

fn info(size: u64, flags: u16) -> Vec<u8> {
    let mut data = vec![0, 0];
    data.put_u64(size);
    data.put_u16(flags);
    answer(option::GO, option_reply::INFO, &data)
}

fn goal() -> Goal {
    Goal::Export { name: "vda".into(), contexts: vec!["base:allocation".into()], framing: Framing::Extended }
}

/// Feeds the script in single bytes; returns the result, what was sent, and what was left over.
fn play(goal: Goal, script: &[Vec<u8>]) -> (Result<Progress>, BytesMut, BytesMut) {
    let (mut handshake, mut input, mut output) = (Handshake::new(goal), BytesMut::new(), BytesMut::new());
    let bytes = script.concat();
    for (index, byte) in bytes.iter().enumerate() {
        input.put_u8(*byte);
        match handshake.step(&mut input, &mut output) {
            Ok(Progress::More) => {}
            result => {
                input.put_slice(&bytes[index + 1..]);
                return (result, output, input);
            }
        }
    }
    (Ok(Progress::More), output, input)
}

fn options_sent(mut output: &[u8]) -> Vec<u32> {
    output.advance(4);
    let mut options = Vec::new();
    while output.has_remaining() {
        assert_eq!(output.get_u64(), wire::OPTION_MAGIC);
        options.push(output.get_u32());
        let length = output.get_u32() as usize;
        output.advance(length);
    }
    options
}

fn ready(result: Result<Progress>) -> Negotiated {
    match result {
        Ok(Progress::Ready(negotiated)) => negotiated,
        other => panic!("{other:?}"),
    }
}

const ACK: u32 = option_reply::ACK;
const UNSUP: u32 = option_reply::ERR_UNSUP;

#[test]
fn a_modern_server_gets_the_modern_dialect_and_the_rest_is_left_alone() {
    let script = [
        greeting(3),
        answer(option::EXTENDED_HEADERS, ACK, b""),
        answer(option::SET_META_CONTEXT, option_reply::META_CONTEXT, b"\0\0\0\x07base:allocation"),
        answer(option::SET_META_CONTEXT, ACK, b""),
        info(1 << 40, 1 | export_flag::READ_ONLY | export_flag::CAN_MULTI_CONN),
        answer(option::GO, option_reply::INFO, &[0, 3, 0, 0, 2, 0, 0, 0, 16, 0, 2, 0, 0, 0]),
        answer(option::GO, ACK, b""),
        b"what follows".to_vec(),
    ];
    let (result, output, rest) = play(goal(), &script);
    let Negotiated { info, framing, context_ids } = ready(result);
    assert_eq!((framing, &context_ids[..]), (Framing::Extended, &[7][..]));
    assert_eq!((info.size_bytes, info.read_only, info.can_multi_conn, info.can_trim), (1 << 40, true, true, false));
    assert_eq!((info.block_min, info.block_preferred, info.block_max), (512, 4096, 32 << 20));
    assert_eq!(info.contexts, ["base:allocation"]);
    assert_eq!(options_sent(&output), [option::EXTENDED_HEADERS, option::SET_META_CONTEXT, option::GO]);
    assert_eq!(rest, "what follows");
}

#[test]
fn what_an_old_server_does_not_know_is_done_without() {
    let mut export = (5u64 << 20).to_be_bytes().to_vec();
    export.put_u16(1);
    let script = [
        greeting(3),
        answer(option::EXTENDED_HEADERS, UNSUP, b"no"),
        answer(option::STRUCTURED_REPLY, UNSUP, b"no"),
        answer(option::GO, UNSUP, b"no"),
        export.clone(),
    ];
    let (result, output, _) = play(goal(), &script);
    let negotiated = ready(result);
    assert_eq!((negotiated.framing, negotiated.info.size_bytes), (Framing::Simple, 5 << 20));
    assert_eq!(
        options_sent(&output),
        [option::EXTENDED_HEADERS, option::STRUCTURED_REPLY, option::GO, option::EXPORT_NAME]
    );
    // Without the agreement to leave them out, there are 124 bytes of nothing.
    let (result, output, rest) = play(goal(), &[greeting(0), export, vec![0; 124], b"x".to_vec()]);
    assert_eq!(ready(result).info.size_bytes, 5 << 20);
    assert_eq!(options_sent(&output), [option::EXPORT_NAME]);
    assert_eq!(rest, "x");
}

#[test]
fn an_unknown_export_is_told_in_the_servers_words_or_by_its_silence() {
    let refusal = answer(option::GO, option_reply::ERR_UNKNOWN, b"no vda here");
    let script = [
        greeting(3),
        answer(option::EXTENDED_HEADERS, ACK, b""),
        answer(option::SET_META_CONTEXT, UNSUP, b""),
        refusal,
    ];
    match play(goal(), &script).0 {
        Err(Error::UnknownExport { name, message }) => assert_eq!((&name[..], &message[..]), ("vda", "no vda here")),
        other => panic!("{other:?}"),
    }
    let mut handshake = Handshake::new(goal());
    let mut input = BytesMut::from(&greeting(0)[..]);
    assert!(matches!(handshake.step(&mut input, &mut BytesMut::new()), Ok(Progress::More)));
    assert!(matches!(handshake.closed_early(), Error::UnknownExport { .. }));
}

#[test]
fn a_listing_is_complete_and_polite() {
    let script = [
        greeting(3),
        answer(option::LIST, option_reply::SERVER, b"\0\0\0\x03vdaFirst disk"),
        answer(option::LIST, option_reply::SERVER, b"\0\0\0\0"),
        answer(option::LIST, ACK, b""),
    ];
    let (result, output, _) = play(Goal::List, &script);
    let Ok(Progress::Listed(exports)) = result else { panic!("{result:?}") };
    let entry = |name: &str, description: &str| ExportEntry { name: name.into(), description: description.into() };
    assert_eq!(exports, [entry("vda", "First disk"), entry("", "")]);
    assert_eq!(options_sent(&output), [option::LIST, option::ABORT]);
}
