//! Probes as people write them: URLs.

use std::time::Duration;

use uuid::Uuid;
use virtward_hypervisor::Hypervisor;

use super::{InsideProbe, Probe, Service, Tls, Verdict, inside::unit_name, probe, probe_inside};

/// How long a probe may take, in milliseconds.
const LIMIT_MS: u32 = 5_000;
/// The forms there are.
const FORMS: &str = "tcp://HOST:PORT, http://HOST[:PORT]/PATH, https://…, tls://HOST:PORT[?days=N], postgresql://HOST[:PORT], \
                     mysql://HOST[:PORT], smtp://HOST[:PORT], unit:NAME or exec:/PROGRAM ARGUMENTS";

/// A service and the way to ask it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// Over the network.
    Outside(Probe),
    /// Through the guest's agent.
    Inside(InsideProbe),
}

impl Target {
    /// Reads a URL. The message says what is wrong with it and which forms there are.
    pub fn parse(text: &str) -> Result<Self, String> {
        let wrong = |why: &str| format!("{text:?} is no probe: {why}; write {FORMS}");
        if text.len() > 1000 || text.chars().any(char::is_control) {
            return Err(format!("a probe is a text of at most 1000 characters; write {FORMS}"));
        }
        if let Some(unit) = text.strip_prefix("unit:") {
            let unit = unit_name(unit).ok_or_else(|| wrong("that is no name of a unit"))?;
            return Ok(Self::Inside(InsideProbe::Unit { unit: unit.into() }));
        }
        if let Some(command) = text.strip_prefix("exec:") {
            let command: Vec<String> = command.split_whitespace().map(str::to_owned).collect();
            return match command.first() {
                Some(program) if program.starts_with('/') => Ok(Self::Inside(InsideProbe::Exec { command })),
                _ => Err(wrong("give the program by its whole path")),
            };
        }
        let (kind, rest) = text.split_once("://").ok_or_else(|| wrong("it has no scheme"))?;
        let (authority, path) = rest.split_at(rest.find(['/', '?']).unwrap_or(rest.len()));
        let (host, port) = host_and_port(authority).ok_or_else(|| wrong("the host or port cannot be read"))?;
        let http = |tls| Service::Http {
            path: if path.starts_with('/') { path.to_owned() } else { format!("/{path}") },
            host: None,
            status: Vec::new(),
            contains: None,
            tls,
        };
        let (service, usual) = match kind {
            "tcp" => (Service::Tcp, None),
            "http" => (http(None), Some(80)),
            "https" => (http(Some(Tls::default())), Some(443)),
            "tls" => {
                let days_left = match path {
                    "" | "/" => 0,
                    path => path
                        .trim_start_matches('/')
                        .strip_prefix("?days=")
                        .and_then(|days| days.parse().ok())
                        .ok_or_else(|| wrong("only ?days=N may follow"))?,
                };
                (Service::Tls(Tls { days_left, ..Tls::default() }), Some(443))
            }
            "postgresql" => (Service::Postgresql, Some(5432)),
            "mysql" => (Service::Mysql, Some(3306)),
            "smtp" => (Service::Smtp, Some(25)),
            _ => return Err(wrong("that scheme is not known")),
        };
        if !matches!(kind, "http" | "https" | "tls") && !matches!(path, "" | "/") {
            return Err(wrong("nothing may follow host and port"));
        }
        let port = port.or(usual).ok_or_else(|| wrong("it needs a port"))?;
        Ok(Self::Outside(Probe { address: host.into(), port, service, timeout_ms: LIMIT_MS }))
    }

    /// Asks.
    pub async fn ask(&self, hypervisor: Option<&dyn Hypervisor>, vm: Uuid) -> Verdict {
        match (self, hypervisor) {
            (Self::Outside(of), _) => probe(of).await,
            (Self::Inside(of), Some(there)) => {
                probe_inside(there, vm, of, Duration::from_millis(LIMIT_MS.into())).await
            }
            (Self::Inside(_), None) => Verdict::Unknown("the hypervisor does not answer".into()),
        }
    }
}

/// `HOST`, `HOST:PORT`, `[ADDRESS]:PORT`.
fn host_and_port(text: &str) -> Option<(&str, Option<u16>)> {
    let (host, port) = match text.strip_prefix('[') {
        Some(rest) => {
            let (host, rest) = rest.split_once(']')?;
            (
                host,
                rest.strip_prefix(':')
                    .or(rest.is_empty().then_some(""))
                    .map(|port| (!port.is_empty()).then_some(port))?,
            )
        }
        None => match text.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (text, None),
        },
    };
    let plain = |c: char| c.is_ascii_alphanumeric() || "-._:%".contains(c);
    if host.is_empty() || !host.chars().all(plain) {
        return None;
    }
    let port = match port {
        Some(port) => Some(port.parse().ok().filter(|port| *port != 0)?),
        None => None,
    };
    Some((host, port))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outside(text: &str) -> Probe {
        match Target::parse(text) {
            Ok(Target::Outside(probe)) => probe,
            other => panic!("{text}: {other:?}"),
        }
    }

    #[test]
    fn urls_say_what_is_asked_and_where() {
        let tcp = outside("tcp://10.0.0.5:5432");
        assert_eq!((tcp.address.as_str(), tcp.port, tcp.service), ("10.0.0.5", 5432, Service::Tcp));
        assert_eq!(outside("postgresql://db1.example").port, 5432);
        assert_eq!((outside("smtp://[2001:db8::5]").port, outside("smtp://[2001:db8::5]:587").port), (25, 587));
        assert_eq!(outside("tls://web1?days=14").service, Service::Tls(Tls { days_left: 14, ..Tls::default() }));
        let http = outside("http://web1:8080/health?deep=1");
        assert!(matches!(http.service, Service::Http { path, tls: None, .. } if path == "/health?deep=1"));
        assert!(matches!(outside("https://web1").service, Service::Http { path, tls: Some(_), .. } if path == "/"));
        let inside = Target::parse("exec:/usr/bin/pg_isready -q").unwrap();
        let command = ["/usr/bin/pg_isready", "-q"].map(str::to_owned).into();
        assert_eq!(inside, Target::Inside(InsideProbe::Exec { command }));
    }

    #[test]
    fn what_is_no_probe_is_named_with_the_forms_there_are() {
        for text in [
            "",
            "tcp://10.0.0.5",
            "tcp://:1",
            "tcp://h:0",
            "tcp://h:70000",
            "tcp://h:1/x",
            "ftp://h",
            "unit:",
            "unit:a b",
            "exec:true",
            "tls://h?days=x",
            "http://a b/",
            "tcp://[::1",
            "web1:80",
            "tcp://h:1\n",
        ] {
            let why = Target::parse(text).expect_err(text);
            assert!(why.contains("tcp://HOST:PORT"), "{text:?}: {why}");
        }
    }
}
