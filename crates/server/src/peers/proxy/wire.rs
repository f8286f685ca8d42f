//! What is said over a line, and the line itself: frames of a message and, of attachments, their bytes.
//!
//! ```text
//! u32 length of the message ─ u32 length of the bytes ─ message, JSON ─ bytes      (lengths big-endian)
//! ```
//!
//! A frame of nothing says that whoever sends it is there.

use std::{
    io,
    marker::PhantomData,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf},
    net::UnixStream,
    sync::mpsc,
    task::AbortHandle,
};
use uuid::Uuid;
use virtward_api::Problem;
use virtward_engine::{Cancel, DiskJob, Terms};
use virtward_model::{DiskRecord, RestorePoint};
use virtward_repo::Compression;

/// Name of the protocol. A change that the other side would not understand gets another one.
pub const PROTOCOL: &str = "virtward-proxy-1";
/// Who has nothing to say, says so; and whoever says nothing for so long is lost.
const PATIENCE: Patience = Patience { beat: Duration::from_secs(5), silence_max: Duration::from_secs(45) };
/// Largest message, and most bytes with it: more than any NVRAM with a TPM has.
const MESSAGE_BYTES_MAX: u32 = 16 << 20;
const BYTES_MAX: u32 = 512 << 20;
/// Frames on their way.
const DEPTH: usize = 16;
/// Between QEMU and the proxy: several blocks of what NBD reads at once.
const CARRIED_BYTES: usize = 256 << 10;

/// What the host of a VM asks of a proxy, once it has said [`Ask::Begin`].
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "ask", rename_all = "kebab-case")]
pub enum Ask {
    /// The first: where to. Answered with [`Tell::Ready`].
    Begin {
        /// The VM, for people.
        vm: String,
        /// Name of the repository in the configuration.
        repository: String,
        /// Its id: one of the same name may be another.
        id: String,
        /// For data that it does not have.
        compression: Compression,
    },
    /// Read and store disks; each one's connection is made apart.
    Store { number: u64, disks: Vec<DiskJob>, terms: Terms },
    /// Store attachments, whose bytes come with it, and make all durable.
    Complete { number: u64, attachments: Vec<(String, u64)> },
    /// Make the restore point visible.
    Publish { number: u64, point: Box<RestorePoint> },
}

/// What a proxy answers.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "tell", rename_all = "kebab-case")]
pub enum Tell {
    /// The session is there.
    Ready { session: Uuid },
    /// How far reading is.
    Progress { total_bytes: u64, done_bytes: u64 },
    /// What was stored.
    Stored { number: u64, disks: Vec<DiskRecord> },
    /// What was asked for is done.
    Done { number: u64 },
    /// It is not, and why; before [`Tell::Ready`], that there will be no session.
    Failed { number: u64, problem: Problem, is_source: bool },
}

/// One end's voice.
pub struct Voice<M> {
    frames: mpsc::Sender<(Vec<u8>, Vec<u8>)>,
    says: PhantomData<fn(M)>,
}

impl<M: Serialize> Voice<M> {
    /// Says something. That the other end is lost is heard, not said.
    pub async fn say(&self, message: &M, bytes: Vec<u8>) {
        if let Ok(message) = serde_json::to_vec(message) {
            let _ = self.frames.send((message, bytes)).await;
        }
    }

    /// Says something that matters only now: not, if others wait to be said.
    pub fn mention(&self, message: &M) {
        if let Ok(message) = serde_json::to_vec(message) {
            let _ = self.frames.try_send((message, Vec::new()));
        }
    }
}

/// One end's ear. Dropping it ends the line.
pub struct Ear<M> {
    messages: mpsc::Receiver<(M, Vec<u8>)>,
    ended: Arc<Mutex<Option<String>>>,
    tasks: [AbortHandle; 2],
}

impl<M> Ear<M> {
    /// What the other end says next; none when the line has ended.
    pub async fn hear(&mut self) -> Option<(M, Vec<u8>)> {
        self.messages.recv().await
    }

    /// Why the line has ended.
    pub fn why(&self) -> String {
        let ended = self.ended.lock().unwrap_or_else(PoisonError::into_inner);
        ended.clone().unwrap_or_else(|| "it hung up".to_owned())
    }
}

impl<M> Drop for Ear<M> {
    fn drop(&mut self) {
        self.tasks.iter().for_each(AbortHandle::abort);
    }
}

/// When somebody is there, and when not any more.
#[derive(Clone, Copy)]
struct Patience {
    beat: Duration,
    silence_max: Duration,
}

/// Makes a line of a connection. `lost` is cancelled when the other end is gone.
pub fn line<Out, In>(connection: impl AsyncRead + AsyncWrite + Send + 'static, lost: Cancel) -> (Voice<Out>, Ear<In>)
where
    In: DeserializeOwned + Send + 'static,
{
    line_with(connection, lost, PATIENCE)
}

fn line_with<Out, In>(
    connection: impl AsyncRead + AsyncWrite + Send + 'static,
    lost: Cancel,
    patience: Patience,
) -> (Voice<Out>, Ear<In>)
where
    In: DeserializeOwned + Send + 'static,
{
    let (reading, writing) = tokio::io::split(connection);
    let (frames, to_send) = mpsc::channel(DEPTH);
    let (heard, messages) = mpsc::channel(DEPTH);
    let ended = Arc::new(Mutex::new(None));
    let speaking = tokio::spawn(speak(writing, to_send, patience.beat));
    let why = ended.clone();
    let listening = tokio::spawn(async move {
        let end = listen(reading, &heard, patience.silence_max).await;
        *why.lock().unwrap_or_else(PoisonError::into_inner) = end.err().map(|error| error.to_string());
        lost.cancel();
    });
    let tasks = [speaking.abort_handle(), listening.abort_handle()];
    (Voice { frames, says: PhantomData }, Ear { messages, ended, tasks })
}

async fn speak<C: AsyncWrite>(mut to: WriteHalf<C>, mut frames: mpsc::Receiver<(Vec<u8>, Vec<u8>)>, beat: Duration) {
    loop {
        let (message, bytes) = match tokio::time::timeout(beat, frames.recv()).await {
            Ok(Some(frame)) => frame,
            Ok(None) => break,
            Err(_) => Default::default(),
        };
        let (Ok(length), Ok(more)) = (u32::try_from(message.len()), u32::try_from(bytes.len())) else { break };
        let head = [length.to_be_bytes(), more.to_be_bytes()].concat();
        let said = async {
            to.write_all(&head).await?;
            to.write_all(&message).await?;
            to.write_all(&bytes).await?;
            to.flush().await
        };
        if said.await.is_err() {
            return;
        }
    }
    let _ = to.shutdown().await;
}

async fn listen<C: AsyncRead, M: DeserializeOwned>(
    mut from: ReadHalf<C>,
    heard: &mpsc::Sender<(M, Vec<u8>)>,
    silence_max: Duration,
) -> io::Result<()> {
    loop {
        let mut head = [0; 8];
        fill(&mut from, &mut head, silence_max).await?;
        let (length, more) = head.split_at(4);
        let number = |bytes: &[u8]| bytes.iter().fold(0_u32, |number, byte| number << 8 | u32::from(*byte));
        let (length, more) = (number(length), number(more));
        if length == 0 && more == 0 {
            continue;
        }
        if length > MESSAGE_BYTES_MAX || more > BYTES_MAX {
            return Err(io::Error::other(format!("it sends {length} and {more} bytes at once, which is too much")));
        }
        let mut message = vec![0; length as usize];
        fill(&mut from, &mut message, silence_max).await?;
        let mut bytes = vec![0; more as usize];
        fill(&mut from, &mut bytes, silence_max).await?;
        let message = serde_json::from_slice(&message)
            .map_err(|error| io::Error::other(format!("it says something that makes no sense: {error}")))?;
        if heard.send((message, bytes)).await.is_err() {
            return Ok(());
        }
    }
}

fn closed() -> io::Error {
    io::Error::other("the connection was closed")
}

/// Reads a buffer full; slow is not silent.
async fn fill<C: AsyncRead>(from: &mut ReadHalf<C>, buffer: &mut [u8], silence_max: Duration) -> io::Result<()> {
    let mut at = 0;
    while at < buffer.len() {
        let silent = || io::Error::other(format!("nothing was heard of it for {silence_max:?}"));
        match tokio::time::timeout(silence_max, from.read(&mut buffer[at..])).await {
            Ok(Ok(0)) => return Err(closed()),
            // In the words of TLS: it was closed without a farewell, as when a process is killed.
            Ok(Err(error)) if error.kind() == io::ErrorKind::UnexpectedEof => return Err(closed()),
            Ok(Ok(count)) => at += count,
            Ok(Err(error)) => return Err(error),
            Err(_) => return Err(silent()),
        }
    }
    Ok(())
}

/// Carries bytes both ways until both ends are done.
pub async fn carry(mut peer: impl AsyncRead + AsyncWrite + Unpin, mut socket: UnixStream) {
    // Requests are small; what is read is not.
    let carried = tokio::io::copy_bidirectional_with_sizes(&mut peer, &mut socket, CARRIED_BYTES, CARRIED_BYTES);
    if let Err(error) = carried.await {
        tracing::debug!(%error, "the connection of a disk to its proxy ended");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOON: Patience = Patience { beat: Duration::from_millis(20), silence_max: Duration::from_millis(500) };

    #[tokio::test]
    async fn a_line_carries_messages_with_bytes_and_beats() {
        let (one, other) = tokio::io::duplex(1 << 16);
        let (lost, also) = (Cancel::default(), Cancel::default());
        let (voice, mut answers) = line_with::<Ask, Tell>(one, lost.clone(), SOON);
        let (tells, mut asks) = line_with::<Tell, Ask>(other, also.clone(), SOON);
        let attachments = vec![("nvram".to_owned(), 3)];
        voice.say(&Ask::Complete { number: 7, attachments }, vec![1, 2, 3]).await;
        let (heard, bytes) = asks.hear().await.unwrap();
        assert!(matches!(heard, Ask::Complete { number: 7, attachments } if attachments[0].0 == "nvram"));
        assert_eq!(bytes, [1, 2, 3]);
        // Nobody has anything to say for longer than anybody may be silent, and nobody is lost.
        tokio::time::sleep(SOON.silence_max * 2).await;
        assert!(!lost.is_cancelled() && !also.is_cancelled());
        tells.say(&Tell::Done { number: 7 }, Vec::new()).await;
        assert!(matches!(answers.hear().await, Some((Tell::Done { number: 7 }, _))));
        // One end goes without a word.
        drop((tells, asks));
        assert!(answers.hear().await.is_none());
        assert!(lost.is_cancelled());
    }

    #[tokio::test]
    async fn who_is_silent_is_lost() {
        let (one, _other) = tokio::io::duplex(1 << 16);
        let lost = Cancel::default();
        let (_voice, mut answers) = line_with::<Ask, Tell>(one, lost.clone(), SOON);
        assert!(answers.hear().await.is_none());
        assert!(answers.why().contains("nothing was heard of it for 500ms"), "{}", answers.why());
        assert!(lost.is_cancelled());
    }

    #[tokio::test]
    async fn what_is_too_much_or_makes_no_sense_ends_the_line() {
        for (bytes, why) in [(&[0xff_u8; 8][..], "too much"), (b"\0\0\0\x02\0\0\0\0{}", "makes no sense")] {
            let (one, mut other) = tokio::io::duplex(1 << 16);
            let (_voice, mut answers) = line_with::<Ask, Tell>(one, Cancel::default(), SOON);
            other.write_all(bytes).await.unwrap();
            assert!(answers.hear().await.is_none());
            assert!(answers.why().contains(why), "{}", answers.why());
        }
    }
}
