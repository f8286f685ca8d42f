//! Servers that break the protocol, played by the test: the client says what is wrong, in bounded time and memory.

mod support;

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bytes::{BufMut, Bytes};
use support::options;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use virtward_nbd::{Address, BASE_ALLOCATION, Client, Error, Framing, Options, ReconnectPolicy, list_exports};

const SIZE: u64 = 1 << 30;

/// A request as the hostile server sees it.
#[derive(Debug, Clone, Copy)]
struct Seen {
    command: u16,
    cookie: u64,
    offset: u64,
}

/// Listens and gives every connection to `serve`.
fn listen<F, R>(directory: &Path, serve: F) -> Address
where
    F: Fn(UnixStream, usize) -> R + Send + 'static,
    R: Future<Output = io::Result<()>> + Send + 'static,
{
    let path = directory.join("s");
    let listener = UnixListener::bind(&path).unwrap();
    tokio::spawn(async move {
        let mut count = 0;
        while let Ok((stream, _)) = listener.accept().await {
            count += 1;
            // That the client hangs up on such a server is the point.
            tokio::spawn(serve(stream, count));
        }
    });
    Address::Unix(path)
}

async fn option(stream: &mut UnixStream) -> io::Result<u32> {
    stream.read_u64().await?;
    let option = stream.read_u32().await?;
    let mut data = vec![0; stream.read_u32().await? as usize];
    stream.read_exact(&mut data).await?;
    Ok(option)
}

fn reply(option: u32, kind: u32, data: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    out.put_u64(0x0003_e889_0455_65a9);
    out.put_u32(option);
    out.put_u32(kind);
    out.put_u32(data.len() as u32);
    out.put_slice(data);
    out
}

/// An honest handshake for structured replies, with base:allocation as context 1.
async fn honest_handshake(stream: &mut UnixStream, size: u64) -> io::Result<()> {
    stream.write_all(b"NBDMAGICIHAVEOPT\0\x03").await?;
    stream.read_u32().await?;
    loop {
        let option = option(stream).await?;
        let answer = match option {
            8 => reply(8, 1, b""),
            10 => [reply(10, 4, b"\0\0\0\x01base:allocation"), reply(10, 1, b"")].concat(),
            7 => {
                let mut info = vec![0, 0];
                info.put_u64(size);
                // Read-only, structured or not, several connections.
                info.put_u16(1 | 1 << 1 | 1 << 8);
                [reply(7, 3, &info), reply(7, 1, b"")].concat()
            }
            _ => reply(option, 1 << 31 | 1, b"what?"),
        };
        stream.write_all(&answer).await?;
        if option == 7 {
            return Ok(());
        }
    }
}

async fn request(stream: &mut UnixStream) -> io::Result<Seen> {
    stream.read_u32().await?;
    stream.read_u16().await?;
    let command = stream.read_u16().await?;
    let cookie = stream.read_u64().await?;
    let offset = stream.read_u64().await?;
    let _length = stream.read_u32().await?;
    Ok(Seen { command, cookie, offset })
}

fn chunk(seen: Seen, flags: u16, kind: u16, body: &[u8]) -> Vec<u8> {
    chunk_claiming(seen, flags, kind, body.len() as u32, body)
}

fn chunk_claiming(seen: Seen, flags: u16, kind: u16, length: u32, body: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    out.put_u32(0x668e_33ef);
    out.put_u16(flags);
    out.put_u16(kind);
    out.put_u64(seen.cookie);
    out.put_u32(length);
    out.put_slice(body);
    out
}

fn data(seen: Seen, flags: u16, at: u64, bytes: &[u8]) -> Vec<u8> {
    chunk(seen, flags, 1, &[&(seen.offset + at).to_be_bytes(), bytes].concat())
}

fn hole(seen: Seen, flags: u16, at: u64, length: u32) -> Vec<u8> {
    chunk(seen, flags, 2, &[&(seen.offset + at).to_be_bytes()[..], &length.to_be_bytes()].concat())
}

fn status(seen: Seen, flags: u16, extents: &[(u32, u32)]) -> Vec<u8> {
    let mut body = vec![0, 0, 0, 1];
    for (length, flags) in extents {
        body.put_u32(*length);
        body.put_u32(*flags);
    }
    chunk(seen, flags, 5, &body)
}

/// A server that shakes hands honestly, and answers every request with what `answer` makes of it.
fn answering(directory: &Path, answer: impl Fn(Seen) -> Vec<u8> + Send + Sync + 'static) -> Address {
    let answer = Arc::new(answer);
    listen(directory, move |mut stream, _| {
        let answer = answer.clone();
        async move {
            honest_handshake(&mut stream, SIZE).await?;
            loop {
                let seen = request(&mut stream).await?;
                if seen.command == 2 {
                    return Ok(());
                }
                stream.write_all(&answer(seen)).await?;
            }
        }
    })
}

fn structured() -> Options {
    Options { contexts: vec![BASE_ALLOCATION.into()], connections: 1, framing: Framing::Structured, ..options() }
}

/// Reads 64 bytes at 4096 from a server that answers so.
async fn read_answered_with(answer: impl Fn(Seen) -> Vec<u8> + Send + Sync + 'static) -> Result<Bytes, Error> {
    let directory = tempfile::tempdir().unwrap();
    let client = Client::connect(&answering(directory.path(), answer), structured()).await.unwrap();
    tokio::time::timeout(Duration::from_secs(10), client.read(4096, 64)).await.expect("an answer or an error")
}

async fn status_answered_with(answer: impl Fn(Seen) -> Vec<u8> + Send + Sync + 'static) -> Result<Vec<u64>, Error> {
    let directory = tempfile::tempdir().unwrap();
    let client = Client::connect(&answering(directory.path(), answer), structured()).await.unwrap();
    let extents = client.block_status(BASE_ALLOCATION, 4096, 1000);
    let extents = tokio::time::timeout(Duration::from_secs(10), extents).await.expect("an answer or an error");
    extents.map(|extents| extents.into_iter().map(|extent| extent.length).collect())
}

#[track_caller]
fn assert_violation<T: std::fmt::Debug>(result: Result<T, Error>, words: &str) {
    match result {
        Err(Error::Protocol(text)) => assert!(text.contains(words), "{text:?} does not say {words:?}"),
        other => panic!("{other:?}, but expected: {words}"),
    }
}

#[tokio::test]
async fn chunks_in_any_order_make_a_whole() {
    let read = read_answered_with(|seen| {
        [data(seen, 0, 48, &[3; 16]), hole(seen, 0, 0, 16), data(seen, 0, 32, &[2; 16]), hole(seen, 1, 16, 16)].concat()
    });
    let read = read.await.unwrap();
    assert_eq!(read, [[0u8; 16], [0; 16], [2; 16], [3; 16]].concat());
}

#[tokio::test]
async fn chunks_that_overlap_leave_gaps_or_stray_are_refused() {
    let overlap = |seen| [data(seen, 0, 0, &[1; 40]), data(seen, 1, 39, &[2; 25])].concat();
    assert_violation(read_answered_with(overlap).await, "overlaps");
    let twice = |seen| [hole(seen, 0, 0, 64), hole(seen, 1, 0, 64)].concat();
    assert_violation(read_answered_with(twice).await, "overlaps");
    assert_violation(read_answered_with(|seen| data(seen, 1, 0, &[1; 63])).await, "without being complete");
    assert_violation(read_answered_with(|seen| hole(seen, 1, 1, 63)).await, "without being complete");
    assert_violation(read_answered_with(|seen| chunk(seen, 1, 0, b"")).await, "without being complete");
    assert_violation(read_answered_with(|seen| data(seen, 1, 1, &[1; 64])).await, "out of place");
    assert_violation(read_answered_with(|seen| hole(seen, 1, 0, u32::MAX)).await, "out of place");
    assert_violation(read_answered_with(|seen| hole(seen, 1, u64::MAX - 4100, 8)).await, "out of place");
    assert_violation(read_answered_with(|seen| hole(seen, 0, 0, 0)).await, "out of place");
    assert_violation(read_answered_with(|seen| data(seen, 0, 0, b"")).await, "a data chunk");
}

#[tokio::test]
async fn lengths_and_kinds_that_make_no_sense_are_refused_before_anything_is_allocated() {
    for (kind, length) in [(1, u32::MAX), (1, 73), (1, 8), (2, 11), (2, u32::MAX), (1 << 15 | 1, 1 << 20), (1 << 15, 3)]
    {
        let answer = move |seen| chunk_claiming(seen, 0, kind, length, b"");
        assert_violation(read_answered_with(answer).await, "chunk");
    }
    assert_violation(read_answered_with(|seen| chunk(seen, 1, 5, &[0; 12])).await, "chunk of type 5");
    assert_violation(read_answered_with(|seen| chunk(seen, 1, 77, &[0; 12])).await, "chunk of type 77");
    assert_violation(read_answered_with(|seen| chunk(seen, 0, 0, b"")).await, "an empty chunk");
    let giant = |seen| chunk_claiming(seen, 1, 5, u32::MAX, b"");
    assert_violation(status_answered_with(giant).await, "block-status chunk");
    let odd = |seen| chunk(seen, 1, 5, &[0, 0, 0, 1, 0, 0, 0, 8, 0, 0, 0, 0, 9]);
    assert_violation(status_answered_with(odd).await, "odd length");
}

#[tokio::test]
async fn answers_that_nobody_waits_for_are_refused() {
    assert_violation(read_answered_with(|_| b"HTTP/1.1 200 OK".to_vec()).await, "a reply begins with");
    let other = |seen: Seen| hole(Seen { cookie: seen.cookie ^ 1, ..seen }, 1, 0, 64);
    assert_violation(read_answered_with(other).await, "not in flight");
    let older = |seen: Seen| hole(Seen { cookie: seen.cookie ^ 1 << 32, ..seen }, 1, 0, 64);
    assert_violation(read_answered_with(older).await, "not in flight");
    let simple = |seen: Seen| [&0x6744_6698u32.to_be_bytes()[..], &[0; 4], &seen.cookie.to_be_bytes()].concat();
    assert_violation(read_answered_with(simple).await, "simple reply to a read");
    assert_violation(status_answered_with(simple).await, "simple reply to a block-status");
}

#[tokio::test]
async fn errors_in_chunks_keep_the_servers_words_and_place() {
    let broken = |seen: Seen| {
        let mut body = vec![0, 0, 0, 5, 0, 9];
        body.put_slice(b"bad plate");
        body.put_u64(seen.offset + 32);
        [hole(seen, 0, 0, 32), chunk(seen, 1, 1 << 15 | 2, &body)].concat()
    };
    match read_answered_with(broken).await {
        Err(Error::Server { offset: 4128, name: "EIO", message, .. }) => assert_eq!(message, "bad plate"),
        other => panic!("{other:?}"),
    }
    // A kind of error that is not known yet still is one; and a message longer than its chunk is a violation.
    let unknown = |seen| chunk(seen, 1, 1 << 15 | 99, &[0, 0, 0, 28, 1, 2, 3]);
    assert!(matches!(read_answered_with(unknown).await, Err(Error::Server { name: "ENOSPC", .. })));
    let lying = |seen| chunk(seen, 1, 1 << 15 | 1, &[0, 0, 0, 5, 0, 200]);
    assert_violation(read_answered_with(lying).await, "garbled");
    let endless = |seen| chunk(seen, 0, 1 << 15 | 1, &[0, 0, 0, 5, 0, 0]).repeat(1000);
    assert_violation(read_answered_with(endless).await, "endless");
}

#[tokio::test]
async fn extents_are_clipped_or_refused_as_the_protocol_says() {
    let long = |seen| status(seen, 1, &[(600, 0), (1 << 30, 3)]);
    assert_eq!(status_answered_with(long).await.unwrap(), [600, 400]);
    assert_eq!(status_answered_with(|seen| status(seen, 1, &[(7, 1)])).await.unwrap(), [7]);
    assert_violation(status_answered_with(|seen| status(seen, 1, &[(0, 0)])).await, "no length");
    assert_violation(status_answered_with(|seen| status(seen, 1, &[(1001, 0), (1, 1)])).await, "after the end");
    assert_violation(status_answered_with(|seen| status(seen, 1, &[(1000, 0), (1, 1)])).await, "after the end");
    assert_violation(status_answered_with(|seen| chunk(seen, 1, 0, b"")).await, "without being complete");
    let twice = |seen| [status(seen, 0, &[(9, 0)]), status(seen, 1, &[(9, 0)])].concat();
    assert_violation(status_answered_with(twice).await, "twice");
    let other = |seen| chunk(seen, 1, 5, &[0, 0, 0, 9, 0, 0, 0, 8, 0, 0, 0, 0]);
    assert_violation(status_answered_with(other).await, "not negotiated");
}

#[tokio::test]
async fn a_walk_over_tiny_answers_advances_and_ends() {
    let directory = tempfile::tempdir().unwrap();
    let asked = Arc::new(AtomicUsize::new(0));
    let count = asked.clone();
    let address = answering(directory.path(), move |seen| {
        count.fetch_add(1, Ordering::Relaxed);
        status(seen, 1, &[(1, 0)])
    });
    let client = Client::connect(&address, structured()).await.unwrap();
    let extents = client.extents(BASE_ALLOCATION, 100..600).unwrap().collect().await.unwrap();
    assert_eq!((extents.len(), extents[0].offset, extents[0].length), (1, 100, 500));
    assert_eq!(asked.load(Ordering::Relaxed), 500);
}

#[tokio::test]
async fn handshakes_that_go_wrong_are_told_apart() {
    let attempt = async |greeting: Vec<u8>| {
        let directory = tempfile::tempdir().unwrap();
        let address = listen(directory.path(), move |mut stream, _| {
            let greeting = greeting.clone();
            async move {
                stream.write_all(&greeting).await?;
                stream.read_to_end(&mut Vec::new()).await.map(|_| ())
            }
        });
        let limits = Options { connect_timeout: Duration::from_millis(300), ..structured() };
        Client::connect(&address, limits).await.map(|_| ())
    };
    assert_violation(attempt(b"SSH-2.0-OpenSSH_9.2p1 Debian".to_vec()).await, "no NBD server");
    assert_violation(attempt(b"NBDMAGICxxxxxxxxxxxxxxxx".to_vec()).await, "unknown style");
    assert!(matches!(attempt(b"NBDMAGIC".to_vec()).await, Err(Error::Timeout { .. })));
    let begin = b"NBDMAGICIHAVEOPT\0\x03".to_vec();
    let with = |answer: Vec<u8>| [begin.clone(), answer].concat();
    assert_violation(attempt(with(vec![9; 20])).await, "begins with");
    let mut giant = reply(8, 1, b"");
    giant[16..20].fill(0xff);
    assert_violation(attempt(with(giant)).await, "4294967295 bytes");
    assert_violation(attempt(with(reply(7, 1, b""))).await, "was asked");
    assert_violation(attempt(with(reply(8, 3, b""))).await, "makes no sense");
    let accepted = reply(8, 1, b"");
    let context = reply(10, 4, b"\0\0\0\x01base:allocation");
    let twice = [accepted.clone(), context.clone(), context.clone()].concat();
    assert_violation(attempt(with(twice)).await, "announced twice");
    let no_size = [accepted.clone(), reply(10, 1, b""), reply(7, 1, b"")].concat();
    assert_violation(attempt(with(no_size)).await, "without its size");
    let blocks = [&[0u8, 3, 0, 0, 0, 3][..], &[0, 0, 16, 0], &[0, 16, 0, 0]].concat();
    let blocks = [accepted.clone(), reply(10, 1, b""), reply(7, 3, &blocks)].concat();
    assert_violation(attempt(with(blocks)).await, "impossible block sizes");
    let huge = [&[0u8, 0][..], &u64::MAX.to_be_bytes(), &[0, 1]].concat();
    let huge = [accepted.clone(), reply(10, 1, b""), reply(7, 3, &huge), reply(7, 1, b"")].concat();
    assert_violation(attempt(with(huge)).await, "bytes");
    let refusal = [accepted, reply(10, 1, b""), reply(7, 1 << 31 | 2, b"not on Sundays")].concat();
    match attempt(with(refusal)).await {
        Err(Error::Refused { what: "NBD_OPT_GO", reason: "NBD_REP_ERR_POLICY", message }) => {
            assert_eq!(message, "not on Sundays");
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn an_endless_listing_ends() {
    let directory = tempfile::tempdir().unwrap();
    let address = listen(directory.path(), |mut stream, _| async move {
        stream.write_all(b"NBDMAGICIHAVEOPT\0\x03").await?;
        loop {
            stream.write_all(&reply(3, 2, b"\0\0\0\x01x").repeat(100)).await?;
        }
    });
    assert_violation(list_exports(&address).await, "more than");
}

#[tokio::test]
async fn a_server_that_never_answers_is_given_up() {
    let directory = tempfile::tempdir().unwrap();
    let address = listen(directory.path(), |mut stream, _| async move {
        honest_handshake(&mut stream, SIZE).await?;
        stream.read_to_end(&mut Vec::new()).await.map(|_| ())
    });
    let limits = Options { request_timeout: Duration::from_millis(200), ..structured() };
    let client = Client::connect(&address, limits).await.unwrap();
    let began = Instant::now();
    let error = client.read(0, 4096).await.unwrap_err();
    assert!(matches!(error, Error::Timeout { .. }) && error.is_retryable(), "{error:?}");
    assert!(began.elapsed() < Duration::from_secs(3));
}

#[tokio::test]
async fn a_server_that_dies_at_every_request_is_given_up() {
    let directory = tempfile::tempdir().unwrap();
    let connections = Arc::new(AtomicUsize::new(0));
    let seen = connections.clone();
    let address = listen(directory.path(), move |mut stream, _| {
        seen.fetch_add(1, Ordering::Relaxed);
        async move {
            honest_handshake(&mut stream, SIZE).await?;
            request(&mut stream).await.map(|_| ())
        }
    });
    let reconnect = ReconnectPolicy { attempts: 3, ..ReconnectPolicy::default() };
    let client = Client::connect(&address, Options { reconnect, ..structured() }).await.unwrap();
    let error = client.read(0, 4096).await.unwrap_err();
    assert!(matches!(error, Error::Disconnected { .. }), "{error:?}");
    assert_eq!(connections.load(Ordering::Relaxed), 4);
}

#[tokio::test]
async fn an_export_that_changed_its_size_is_not_used_again() {
    let directory = tempfile::tempdir().unwrap();
    let address = listen(directory.path(), |mut stream, count| async move {
        honest_handshake(&mut stream, SIZE + count as u64).await?;
        request(&mut stream).await.map(|_| ())
    });
    let client = Client::connect(&address, Options { reconnect: ReconnectPolicy::default(), ..structured() });
    let client = client.await.unwrap();
    match client.read(0, 4096).await {
        Err(Error::ExportChanged { change, .. }) => assert!(change.contains("bytes"), "{change}"),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn one_connection_that_breaks_does_not_stop_the_others() {
    let directory = tempfile::tempdir().unwrap();
    let served = Arc::new(AtomicUsize::new(0));
    let count = served.clone();
    let address = listen(directory.path(), move |mut stream, connection| {
        let count = count.clone();
        async move {
            // The second connection breaks at its first request, and is refused from then on.
            if connection > 3 {
                return Ok(());
            }
            honest_handshake(&mut stream, SIZE).await?;
            loop {
                let seen = request(&mut stream).await?;
                if connection == 2 {
                    return Ok(());
                }
                count.fetch_add(1, Ordering::Relaxed);
                stream.write_all(&hole(seen, 1, 0, 64)).await?;
            }
        }
    });
    let reconnect = ReconnectPolicy { attempts: 2, delay: Duration::from_millis(1), ..ReconnectPolicy::default() };
    let client = Client::connect(&address, Options { connections: 3, reconnect, ..structured() }).await.unwrap();
    while client.connections_up() < 3 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let reads = futures::future::join_all((0..30).map(|i| client.read(i * 4096, 64))).await;
    let failed = reads.iter().filter(|read| read.is_err()).count();
    // What was already on its way there fails when the attempts are used up; nothing else does, nor anything later.
    assert!((1..=16).contains(&failed), "{failed} failed");
    assert_eq!(served.load(Ordering::Relaxed), 30 - failed);
    for i in 0..30 {
        client.read(i * 4096, 64).await.unwrap();
    }
    assert_eq!(client.connections_up(), 2);
}
