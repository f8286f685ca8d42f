//! Protocols of lines: SMTP.

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::{Failed, READ_BYTES, Stream};

/// Greeting, EHLO, QUIT: what a peer that wants to deliver does first.
pub(super) async fn smtp(mut stream: impl Stream) -> Result<String, Failed> {
    let mut left = READ_BYTES;
    let greeting = reply(&mut stream, &mut left).await?;
    expect(&greeting, "220")?;
    stream.write_all(b"EHLO virtward.invalid\r\n").await?;
    expect(&reply(&mut stream, &mut left).await?, "250")?;
    // Politeness; the verdict stands.
    let _ = stream.write_all(b"QUIT\r\n").await;
    Ok(greeting)
}

fn expect(reply: &str, code: &str) -> Result<(), Failed> {
    if reply.starts_with(code) { Ok(()) } else { Err(Failed::Service(format!("answers {reply:?}"))) }
}

/// One reply; the last of its lines (`250-...` announces another one).
async fn reply(stream: &mut impl Stream, left: &mut usize) -> Result<String, Failed> {
    loop {
        let line = line(stream, left).await?;
        if line.len() < 3 || !line.as_bytes()[..3].iter().all(u8::is_ascii_digit) {
            return Err(Failed::Service(format!("speaks no SMTP: {line:?}")));
        }
        if line.as_bytes().get(3) != Some(&b'-') {
            return Ok(line);
        }
    }
}

/// One line, byte by byte, as nothing must be read beyond it; the kernel has the rest.
async fn line(stream: &mut impl Stream, left: &mut usize) -> Result<String, Failed> {
    let mut line = Vec::new();
    loop {
        let byte = stream.read_u8().await?;
        *left = left.checked_sub(1).ok_or_else(|| Failed::Service("talks without end".into()))?;
        match byte {
            b'\n' => return Ok(String::from_utf8_lossy(&line).trim_end().to_owned()),
            byte => line.push(byte),
        }
    }
}
