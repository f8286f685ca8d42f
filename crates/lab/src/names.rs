//! Names that end up in paths, interface names, XML and command lines, checked once where they enter.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// What was wrong with a name.
#[derive(Debug, PartialEq, Eq)]
pub struct BadName {
    input: String,
    rule: &'static str,
}

impl fmt::Display for BadName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} is not allowed; {}", self.input, self.rule)
    }
}

impl std::error::Error for BadName {}

macro_rules! name_type {
    ($(#[$doc:meta])* $name:ident, $rule:literal, $valid:expr) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// The name.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = BadName;

            fn from_str(input: &str) -> Result<Self, BadName> {
                let valid: fn(&str) -> bool = $valid;
                if valid(input) { Ok(Self(input.to_owned())) } else { Err(BadName { input: input.to_owned(), rule: $rule }) }
            }
        }

        impl TryFrom<String> for $name {
            type Error = BadName;

            fn try_from(input: String) -> Result<Self, BadName> {
                input.parse()
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> Self {
                name.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&self.0)
            }
        }
    };
}

name_type!(
    /// The name of a lab. No dot, which separates lab and host in the name of a network namespace.
    LabName,
    "a lab's name has 1 to 32 of a-z, 0-9 and -, and starts with a letter or digit",
    |s| (1..=32).contains(&s.len())
        && !s.starts_with('-')
        && s.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
);

name_type!(
    /// The name of a host: h1, h2, ...
    HostName,
    "hosts are named h1, h2, ...",
    |s| s.len() <= 3
        && s.strip_prefix('h').is_some_and(|n| {
            !n.is_empty() && !n.starts_with('0') && n.bytes().all(|b| b.is_ascii_digit())
        })
);

name_type!(
    /// The name of a guest.
    VmName,
    "a guest's name has 1 to 60 of A-Z, a-z, 0-9, -, _ and ., and starts with a letter or digit",
    |s| (1..=60).contains(&s.len())
        && s.as_bytes()[0].is_ascii_alphanumeric()
        && s.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
);

name_type!(
    /// A unicast MAC address in lower case: 52:54:00:12:34:56.
    Mac,
    "a MAC address looks like 52:54:00:12:34:56, and its first byte is even",
    |s| {
        let bytes: Vec<&str> = s.split(':').collect();
        bytes.len() == 6
            && bytes.iter().all(|b| b.len() == 2 && b.bytes().all(|c| c.is_ascii_digit() || (b'a'..=b'f').contains(&c)))
            && u8::from_str_radix(bytes[0], 16).is_ok_and(|first| first % 2 == 0)
    }
);

impl HostName {
    /// The name of host number `n`, counted from 1.
    pub fn numbered(n: u8) -> Self {
        Self(format!("h{n}"))
    }

    /// The host's number.
    pub fn number(&self) -> u8 {
        self.0[1..].parse().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_could_leave_their_directory_are_refused() {
        for bad in ["", ".", "..", "a/b", "A", "-a", "a b", "a.b", "ü", &"a".repeat(33)] {
            assert!(bad.parse::<LabName>().is_err(), "{bad}");
        }
        for bad in ["", "..", ".a", "a/b", "a b", "-x", "a\n", "<x>"] {
            assert!(bad.parse::<VmName>().is_err(), "{bad}");
        }
        for bad in ["h", "h0", "h01", "1", "H1", "h1/..", "h-1", "h1000", "h+1"] {
            assert!(bad.parse::<HostName>().is_err(), "{bad}");
        }
        for bad in ["53:54:00:00:00:00", "52:54:00:00:00", "52:54:00:00:00:0g", "525400000000"] {
            assert!(bad.parse::<Mac>().is_err(), "{bad}");
        }
        assert!("web1.example_2".parse::<VmName>().is_ok());
        assert_eq!("h12".parse::<HostName>().unwrap().number(), 12);
        assert_eq!("lab-2".parse::<LabName>().unwrap().as_str(), "lab-2");
    }
}
