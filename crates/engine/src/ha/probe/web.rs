//! One HTTP/1.1 request and the beginning of its answer.

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::{Failed, READ_BYTES, Stream};

/// What is asked, and which answer is good.
pub(super) struct Question<'a> {
    pub path: &'a str,
    pub host: &'a str,
    pub status: &'a [u16],
    pub contains: Option<&'a str>,
}

impl Question<'_> {
    pub(super) async fn ask(&self, mut stream: impl Stream) -> Result<String, Failed> {
        let bad = |text: &str| text.chars().any(|c| c.is_control() || c.is_whitespace());
        if !self.path.starts_with('/') || bad(self.path) || bad(self.host) {
            return Err(Failed::Question(format!(
                "{:?} on {:?} is nothing that can be asked for",
                self.path, self.host
            )));
        }
        let request = format!(
            "GET {} HTTP/1.1\r\nHost: {}\r\nUser-Agent: virtward-probe\r\nAccept: */*\r\nConnection: close\r\n\r\n",
            self.path, self.host
        );
        stream.write_all(request.as_bytes()).await?;
        let mut answer = Vec::new();
        let mut buffer = vec![0; 8 << 10];
        while answer.len() < READ_BYTES && !self.settled(&answer) {
            match stream.read(&mut buffer).await {
                Ok(0) => break,
                Ok(count) => answer.extend_from_slice(&buffer[..count.min(READ_BYTES - answer.len())]),
                // Servers that close without TLS's goodbye are common; what was read counts.
                Err(_) if !answer.is_empty() => break,
                Err(error) => return Err(error.into()),
            }
        }
        self.judge(&answer)
    }

    /// Whether enough was read to judge.
    fn settled(&self, answer: &[u8]) -> bool {
        let Some((head, body)) = split(answer) else { return false };
        let failed = status(head).is_none_or(|status| !self.accepts(status));
        failed || self.contains.is_none_or(|text| holds(body, text))
    }

    fn judge(&self, answer: &[u8]) -> Result<String, Failed> {
        let (head, body) = split(answer).ok_or_else(|| Failed::Service("speaks no HTTP, or endless headers".into()))?;
        let status = status(head).ok_or_else(|| Failed::Service("speaks no HTTP".into()))?;
        if !self.accepts(status) {
            return Err(Failed::Service(format!("answers {status}")));
        }
        match self.contains {
            Some(text) if !holds(body, text) => {
                Err(Failed::Service(format!("answers {status}, but {text:?} is not in the answer")))
            }
            _ => Ok(format!("answers {status}")),
        }
    }

    fn accepts(&self, status: u16) -> bool {
        if self.status.is_empty() { (200..400).contains(&status) } else { self.status.contains(&status) }
    }
}

fn split(answer: &[u8]) -> Option<(&[u8], &[u8])> {
    let at = answer.windows(4).position(|four| four == b"\r\n\r\n")?;
    Some((&answer[..at], &answer[at + 4..]))
}

fn status(head: &[u8]) -> Option<u16> {
    let line = std::str::from_utf8(head.split(|byte| *byte == b'\r').next()?).ok()?;
    let mut words = line.split(' ');
    words.next().filter(|version| version.starts_with("HTTP/1."))?;
    words.next().filter(|code| code.len() == 3)?.parse().ok()
}

fn holds(body: &[u8], text: &str) -> bool {
    text.is_empty() || body.windows(text.len()).any(|part| part == text.as_bytes())
}
