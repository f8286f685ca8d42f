//! Unix or TCP, behind the few operations that the client needs. Encryption would be a third variant.

use std::io::{self, IoSlice};
use std::sync::Arc;

use bytes::{Buf, BytesMut};
use tokio::net::{TcpStream, UnixStream};

use crate::address::Address;
use crate::demux::Sink;
use crate::error::{Error, Result};
use crate::handshake::{Goal, Handshake, Progress};

/// A connected stream.
#[derive(Debug)]
pub(crate) enum Socket {
    Unix(UnixStream),
    Tcp(TcpStream),
}

macro_rules! each {
    ($self:ident, $stream:ident => $body:expr) => {
        match $self {
            Socket::Unix($stream) => $body,
            Socket::Tcp($stream) => $body,
        }
    };
}

impl Socket {
    pub(crate) async fn connect(address: &Address) -> Result<Self> {
        let connected = match address {
            Address::Unix(path) => UnixStream::connect(path).await.map(Socket::Unix),
            Address::Tcp { host, port } => TcpStream::connect((host.as_str(), *port)).await.and_then(|stream| {
                // Requests are small and latency counts; the kernel must not wait for more.
                stream.set_nodelay(true)?;
                Ok(Socket::Tcp(stream))
            }),
        };
        connected.map_err(|source| Error::Connect { address: address.to_string(), source: Arc::new(source) })
    }

    pub(crate) async fn readable(&self) -> io::Result<()> {
        each!(self, stream => stream.readable().await)
    }

    pub(crate) async fn writable(&self) -> io::Result<()> {
        each!(self, stream => stream.writable().await)
    }

    /// Receives into `buffer`, within its capacity. `None`: nothing there now. `Some(0)`: the peer closed.
    pub(crate) fn try_receive(&self, buffer: &mut BytesMut) -> io::Result<Option<usize>> {
        unless_blocked(each!(self, stream => stream.try_read_buf(buffer)))
    }

    /// The same, straight to where data belongs.
    pub(crate) fn try_receive_data(&self, sink: Sink<'_>) -> io::Result<Option<usize>> {
        unless_blocked(match sink {
            Sink::Append(mut buffer) => each!(self, stream => stream.try_read_buf(&mut buffer)),
            Sink::Fill(buffer) => each!(self, stream => stream.try_read(buffer)),
        })
    }

    pub(crate) fn try_send(&self, slices: &[IoSlice<'_>]) -> io::Result<Option<usize>> {
        unless_blocked(each!(self, stream => stream.try_write_vectored(slices)))
    }

    /// Sends all of `output`.
    pub(crate) async fn send(&self, output: &mut BytesMut) -> io::Result<()> {
        while !output.is_empty() {
            self.writable().await?;
            if let Some(count) = self.try_send(&[IoSlice::new(output)])? {
                output.advance(count);
            }
        }
        Ok(())
    }

    /// Runs a handshake to its end. What the server sent beyond it stays in `input`.
    pub(crate) async fn shake_hands(&self, goal: Goal, input: &mut BytesMut) -> Result<Progress> {
        let broken = |source| Error::lost_io("it broke during the handshake", source);
        let mut handshake = Handshake::new(goal);
        let mut output = BytesMut::new();
        loop {
            let progress = handshake.step(input, &mut output)?;
            // A server that hangs up on us need not take our farewell.
            let sent = self.send(&mut output).await;
            if !matches!(progress, Progress::More) {
                return Ok(progress);
            }
            sent.map_err(broken)?;
            self.readable().await.map_err(broken)?;
            input.reserve(4096);
            if self.try_receive(input).map_err(broken)? == Some(0) {
                return Err(handshake.closed_early());
            }
        }
    }
}

fn unless_blocked(result: io::Result<usize>) -> io::Result<Option<usize>> {
    match result {
        Ok(count) => Ok(Some(count)),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
        Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(None),
        Err(error) => Err(error),
    }
}
