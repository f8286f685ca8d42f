//! The clear description of a repository. Every key slot carries a copy, so losing `config` loses nothing.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::{
    FORMAT, ObjectId,
    envelope::{self, Kind},
    names,
};
use crate::error::{Error, Result};

/// What can be known of a repository without a key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Config {
    /// Identity; bound into everything that is encrypted.
    pub repository: ObjectId,
    /// Format of the repository.
    pub format: u32,
    /// When it was made.
    pub created: Timestamp,
    /// Features that a reader must know to understand the repository. Format 1 has none.
    #[serde(default)]
    pub features: Vec<String>,
}

impl Config {
    /// A new repository.
    pub fn new() -> Self {
        Self { repository: ObjectId::random(), format: FORMAT, created: Timestamp::now(), features: Vec::new() }
    }

    /// As an object.
    pub fn encode(&self) -> Vec<u8> {
        envelope::finish(envelope::begin(Kind::Config, self, 0), &[])
    }

    /// From the object.
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        let envelope = envelope::parse(bytes, Kind::Config).map_err(|e| e.at(names::CONFIG))?;
        Self::from_json(envelope.header, names::CONFIG)
    }

    /// From JSON that has at least the fields of a config. The format decides before anything else is looked at.
    pub fn from_json(json: &[u8], object: &str) -> Result<Self> {
        #[derive(Deserialize)]
        struct Format {
            format: u32,
        }
        let bad = |_| Error::damaged(object, "its header does not decode");
        let Format { format } = serde_json::from_slice(json).map_err(bad)?;
        if format != FORMAT {
            return Err(Error::NewerFormat { object: object.into(), found: format, supported: FORMAT });
        }
        let config: Self = serde_json::from_slice(json).map_err(bad)?;
        match config.features.first() {
            None => Ok(config),
            Some(feature) => Err(Error::Unsupported {
                what: format!("the repository needs the feature {feature:?}; upgrade virtward on this host"),
            }),
        }
    }
}

impl Default for Config {
    fn default() -> Self {
        Self::new()
    }
}
