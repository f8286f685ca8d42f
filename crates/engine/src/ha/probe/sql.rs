//! The first words of PostgreSQL and MySQL, before any login.

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::{Failed, READ_BYTES, Stream, exactly};

/// PostgreSQL starts, stops or recovers, and takes no sessions.
const CANNOT_CONNECT_NOW: &str = "57P03";
/// Every slot is taken: nobody else gets in either.
const TOO_MANY_CONNECTIONS: &str = "53300";
const PROTOCOL_3: u32 = 196_608;

/// Asks for a session as somebody who does not exist. To be asked who one is, or to be refused as a person, shows a
/// server that takes sessions, as `pg_isready` sees it.
pub(super) async fn postgresql(mut stream: impl Stream) -> Result<String, Failed> {
    let mut startup = PROTOCOL_3.to_be_bytes().to_vec();
    startup.extend_from_slice(b"user\0virtward-probe\0application_name\0virtward\0\0");
    let mut message = (startup.len() as u32 + 4).to_be_bytes().to_vec();
    message.extend_from_slice(&startup);
    stream.write_all(&message).await?;
    let [kind] = exactly::<1>(&mut stream).await?;
    let length = u32::from_be_bytes(exactly(&mut stream).await?) as usize;
    if !(4..=READ_BYTES).contains(&length) {
        return Err(Failed::Service("speaks no PostgreSQL".into()));
    }
    let mut body = vec![0; length - 4];
    stream.read_exact(&mut body).await?;
    match kind {
        b'R' => Ok("accepts sessions".into()),
        b'E' => {
            let field = |tag: u8| {
                let fields = body.split(|byte| *byte == 0).filter(|field| !field.is_empty());
                fields
                    .into_iter()
                    .find(|field| field[0] == tag)
                    .map(|field| String::from_utf8_lossy(&field[1..]).into_owned())
            };
            let (code, said) = (field(b'C').unwrap_or_default(), field(b'M').unwrap_or_default());
            match code.as_str() {
                CANNOT_CONNECT_NOW | TOO_MANY_CONNECTIONS => Err(Failed::Service(said)),
                // Refused as a person (no such role, no such database, no entry in pg_hba.conf).
                code if code.starts_with("28") || code.starts_with("3D") => Ok("accepts sessions".into()),
                _ => Err(Failed::Service(format!("{said} ({code})"))),
            }
        }
        _ => Err(Failed::Service("speaks no PostgreSQL".into())),
    }
}

/// Waits for the greeting of protocol 10. A server that refuses this host (error 1130) counts as failing, since the
/// probe would be blind; one that has no slot left does too.
pub(super) async fn mysql(mut stream: impl Stream) -> Result<String, Failed> {
    let header = exactly::<4>(&mut stream).await?;
    let length = u32::from_le_bytes([header[0], header[1], header[2], 0]) as usize;
    if !(1..=READ_BYTES).contains(&length) || header[3] != 0 {
        return Err(Failed::Service("speaks no MySQL".into()));
    }
    let mut packet = vec![0; length];
    stream.read_exact(&mut packet).await?;
    match packet[0] {
        10 => {
            let version = packet[1..].split(|byte| *byte == 0).next().unwrap_or_default();
            Ok(String::from_utf8_lossy(version).into_owned())
        }
        0xff if packet.len() >= 3 => {
            let code = u16::from_le_bytes([packet[1], packet[2]]);
            Err(Failed::Service(format!("{} (error {code})", String::from_utf8_lossy(&packet[3..]))))
        }
        _ => Err(Failed::Service("speaks no MySQL".into())),
    }
}
