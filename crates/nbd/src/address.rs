//! Where an NBD server listens, and how such places are written.
//!
//! Understands the forms of the NBD URI specification that need no TLS: `nbd://host:port/export` and
//! `nbd+unix:///export?socket=/path`. Percent-escapes are decoded in both parts.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use crate::error::{Error, Result};

/// Port that IANA assigned to NBD.
pub const DEFAULT_PORT: u16 = 10809;

/// Where a server listens.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Address {
    /// A Unix stream socket.
    Unix(PathBuf),
    /// A TCP port.
    Tcp {
        /// Name or address; an IPv6 address without brackets.
        host: String,
        /// Port.
        port: u16,
    },
}

impl Address {
    /// Parses an NBD URI into the server's address and the export's name.
    ///
    /// # Errors
    /// [`Error::BadAddress`] says what is missing or not understood.
    pub fn parse_uri(text: &str) -> Result<(Address, String)> {
        let bad = |reason| Error::BadAddress { text: text.to_string(), reason };
        let (scheme, rest) = text.split_once("://").ok_or_else(|| bad("expected nbd://… or nbd+unix://…"))?;
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (authority, export) = rest.split_once('/').unwrap_or((rest, ""));
        let export = unescape(export).ok_or_else(|| bad("the export name has a broken %-escape"))?;
        match scheme {
            "nbd" => Ok((parse_tcp(authority).map_err(bad)?, export)),
            "nbd+unix" if !authority.is_empty() => {
                Err(bad("nbd+unix takes no host: write nbd+unix:///export?socket=…"))
            }
            "nbd+unix" => {
                let socket = query.split('&').find_map(|pair| pair.strip_prefix("socket="));
                let socket = socket.filter(|s| !s.is_empty()).ok_or_else(|| bad("nbd+unix needs ?socket=/path"))?;
                let socket = unescape(socket).ok_or_else(|| bad("the socket path has a broken %-escape"))?;
                Ok((Address::Unix(PathBuf::from(socket)), export))
            }
            "nbds" | "nbds+unix" => Err(bad("TLS is not supported; use nbd:// or nbd+unix://")),
            _ => Err(bad("expected nbd://… or nbd+unix://…")),
        }
    }
}

impl FromStr for Address {
    type Err = Error;

    /// Parses an NBD URI and ignores its export.
    fn from_str(text: &str) -> Result<Self> {
        Self::parse_uri(text).map(|(address, _)| address)
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Unix(path) => write!(f, "nbd+unix:///?socket={}", path.display()),
            Address::Tcp { host, port } if host.contains(':') => write!(f, "nbd://[{host}]:{port}"),
            Address::Tcp { host, port } => write!(f, "nbd://{host}:{port}"),
        }
    }
}

fn parse_tcp(authority: &str) -> Result<Address, &'static str> {
    let authority = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
    let (host, port) = match authority.strip_prefix('[') {
        Some(rest) => {
            let (host, rest) = rest.split_once(']').ok_or("the IPv6 address lacks its closing bracket")?;
            (host, if rest.is_empty() { None } else { Some(rest.strip_prefix(':').ok_or("expected :port after ]")?) })
        }
        None => match authority.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (authority, None),
        },
    };
    if host.is_empty() {
        return Err("the host is missing");
    }
    let port = match port {
        Some(port) => port.parse().map_err(|_| "the port is not a number below 65536")?,
        None => DEFAULT_PORT,
    };
    Ok(Address::Tcp { host: host.to_string(), port })
}

fn unescape(text: &str) -> Option<String> {
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        if byte == b'%' {
            let high = char::from(bytes.next()?).to_digit(16)?;
            let low = char::from(bytes.next()?).to_digit(16)?;
            out.push((high * 16 + low) as u8);
        } else {
            out.push(byte);
        }
    }
    String::from_utf8(out).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uris_that_people_write() {
        let tcp = |host: &str, port| Address::Tcp { host: host.into(), port };
        for (text, address, export) in [
            ("nbd://host", tcp("host", 10809), ""),
            ("nbd://host:1/", tcp("host", 1), ""),
            ("nbd://10.0.0.1:10900/vda", tcp("10.0.0.1", 10900), "vda"),
            ("nbd://[fe80::1]:5/a/b", tcp("fe80::1", 5), "a/b"),
            ("nbd+unix:///vda?socket=/run/x.sock", Address::Unix("/run/x.sock".into()), "vda"),
            ("nbd+unix:///?socket=/run/x%20y", Address::Unix("/run/x y".into()), ""),
            ("nbd+unix:///a%2Fb?tls=off&socket=/s", Address::Unix("/s".into()), "a/b"),
        ] {
            assert_eq!(Address::parse_uri(text).unwrap(), (address, export.to_string()), "{text}");
        }
    }

    #[test]
    fn what_is_not_an_address_is_refused_with_a_reason() {
        for text in [
            "",
            "host",
            "http://x",
            "nbd://",
            "nbd://h:x",
            "nbd://h:70000",
            "nbd://[::1",
            "nbd+unix:///x",
            "nbd+unix://h/x?socket=/s",
            "nbd+unix:///x?socket=",
            "nbd://h/%zz",
            "nbd://h/%f",
            "nbds://h",
        ] {
            assert!(matches!(Address::parse_uri(text), Err(Error::BadAddress { .. })), "{text}");
        }
    }

    #[test]
    fn what_is_printed_can_be_read_back() {
        for address in ["nbd://h:1", "nbd://[::1]:2", "nbd+unix:///?socket=/run/s"] {
            assert_eq!(address.parse::<Address>().unwrap().to_string(), address);
        }
    }
}
