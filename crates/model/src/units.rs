//! Units with their names: a size is never a bare integer at a boundary.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// A size or an offset in bytes. Serialises as an integer; parses `512`, `64KiB`, `2GiB`, `100MB`, `2G`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Bytes(pub u64);

/// What was wrong with a size that a person typed.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{input:?} is not a size; write a number with an optional unit, such as 512MiB, 2GiB or 100MB")]
pub struct ParseBytesError {
    input: String,
}

impl Bytes {
    /// `n` binary kilobytes.
    pub const fn kib(n: u64) -> Self {
        Self(n << 10)
    }
    /// `n` binary megabytes.
    pub const fn mib(n: u64) -> Self {
        Self(n << 20)
    }
    /// `n` binary gigabytes.
    pub const fn gib(n: u64) -> Self {
        Self(n << 30)
    }
    /// The number of bytes.
    pub const fn get(self) -> u64 {
        self.0
    }
    /// In the largest binary unit that needs no fraction, so that it parses as the same size: `100MiB`, `1000`.
    pub fn exact(self) -> String {
        const UNITS: [&str; 5] = ["", "KiB", "MiB", "GiB", "TiB"];
        let unit = (self.0.trailing_zeros() as usize / 10).min(UNITS.len() - 1) * usize::from(self.0 > 0);
        format!("{}{}", self.0 >> (unit * 10), UNITS[unit])
    }
}

impl From<u64> for Bytes {
    fn from(bytes: u64) -> Self {
        Self(bytes)
    }
}

impl fmt::Display for Bytes {
    /// Binary units with one decimal from KiB up: `0 B`, `16.0 MiB`, `1.3 GiB`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [&str; 6] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
        let mut value = self.0 as f64;
        let mut unit = 0;
        while value >= 1024.0 && unit + 1 < UNITS.len() {
            value /= 1024.0;
            unit += 1;
        }
        if unit == 0 { write!(f, "{} B", self.0) } else { write!(f, "{value:.1} {}", UNITS[unit]) }
    }
}

impl FromStr for Bytes {
    type Err = ParseBytesError;

    fn from_str(input: &str) -> Result<Self, Self::Err> {
        let bad = || ParseBytesError { input: input.to_owned() };
        let text = input.trim();
        let split = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
        let (number, unit) = text.split_at(split);
        let factor: u64 = match unit.trim().to_ascii_lowercase().as_str() {
            "" | "b" => 1,
            "k" | "kib" => 1 << 10,
            "m" | "mib" => 1 << 20,
            "g" | "gib" => 1 << 30,
            "t" | "tib" => 1 << 40,
            "kb" => 1_000,
            "mb" => 1_000_000,
            "gb" => 1_000_000_000,
            "tb" => 1_000_000_000_000,
            _ => return Err(bad()),
        };
        if let Ok(whole) = number.parse::<u64>() {
            return whole.checked_mul(factor).map(Bytes).ok_or_else(bad);
        }
        let value: f64 = number.parse().map_err(|_| bad())?;
        let bytes = value * factor as f64;
        if bytes.is_finite() && (0.0..u64::MAX as f64).contains(&bytes) { Ok(Bytes(bytes as u64)) } else { Err(bad()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_parse_and_print() {
        for (text, bytes) in
            [("512", 512), ("64KiB", 65536), ("2GiB", 2 << 30), ("1.5g", 3 << 29), ("100 MB", 100_000_000)]
        {
            assert_eq!(text.parse(), Ok(Bytes(bytes)), "{text}");
        }
        for text in ["", "GiB", "2XiB", "-1", "99999999999TiB", "1.2.3M", "nan"] {
            assert!(text.parse::<Bytes>().is_err(), "{text}");
        }
        assert_eq!(Bytes::mib(16).to_string(), "16.0 MiB");
        assert_eq!(Bytes(17).to_string(), "17 B");
        for (size, text) in
            [(Bytes(0), "0"), (Bytes(1000), "1000"), (Bytes::mib(100), "100MiB"), (Bytes(3 << 50), "3072TiB")]
        {
            assert_eq!(size.exact(), text);
            assert_eq!(text.parse(), Ok(size));
        }
    }
}
