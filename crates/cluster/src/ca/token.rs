//! Join tokens: a person carries one from the cluster to a new node. Each works once and not for long.
//!
//! A token has a name to be found by, a secret, and the fingerprint of the cluster's authority, by which the new node
//! knows the cluster before it says anything. The store has the secret's hash only. (A plain hash: the secret is 32
//! random bytes and cannot be guessed.)

use std::{fmt, str::FromStr, time::Duration};

use aws_lc_rs::constant_time::verify_slices_are_equal;
use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use zeroize::{Zeroize, ZeroizeOnDrop, Zeroizing};

use super::{Error, Fingerprint, Result, Role, random};
use crate::{Error as StoreError, Op, Store};

const PREFIX: &str = "/join/";
const VERSION: &str = "vwj1";
/// Used and expired tokens are kept this long, so that whoever comes with one is told what happened to it.
const REMEMBERED: Duration = Duration::from_secs(7 * 24 * 3600);
const ATTEMPTS: usize = 5;

/// A token in the hands of a person. Its text is secret.
#[derive(Clone, Zeroize, ZeroizeOnDrop)]
pub struct JoinToken {
    id: [u8; 8],
    secret: [u8; 32],
    #[zeroize(skip)]
    fingerprint: Fingerprint,
}

impl JoinToken {
    /// Name of the token, which is no secret: to revoke it by.
    pub fn id(&self) -> String {
        hex::encode(self.id)
    }

    /// The authority that the cluster must have.
    pub fn fingerprint(&self) -> Fingerprint {
        self.fingerprint
    }

    /// All of it, to be carried to the new node.
    pub fn expose(&self) -> Zeroizing<String> {
        let bytes = Zeroizing::new([&self.id[..], &self.secret, &self.fingerprint.0].concat());
        Zeroizing::new(format!("{VERSION}.{}", URL_SAFE_NO_PAD.encode(&bytes)))
    }

    fn hash(&self) -> [u8; 32] {
        blake3::derive_key("virtward join token 1", &self.secret)
    }
}

impl FromStr for JoinToken {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let malformed = Error::TokenMalformed;
        let Some((VERSION, body)) = text.trim().split_once('.') else { return Err(malformed) };
        if body.len() > 200 {
            return Err(malformed);
        }
        let bytes = Zeroizing::new(URL_SAFE_NO_PAD.decode(body).map_err(|_| Error::TokenMalformed)?);
        let bytes: &[u8; 72] = bytes.as_slice().try_into().map_err(|_| Error::TokenMalformed)?;
        let mut token = Self { id: [0; 8], secret: [0; 32], fingerprint: Fingerprint([0; 32]) };
        token.id.copy_from_slice(&bytes[..8]);
        token.secret.copy_from_slice(&bytes[8..40]);
        token.fingerprint.0.copy_from_slice(&bytes[40..]);
        Ok(token)
    }
}

impl fmt::Debug for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JoinToken").field("id", &self.id()).finish_non_exhaustive()
    }
}

/// In the store.
#[derive(Serialize, Deserialize)]
struct Record {
    hash: String,
    role: Role,
    expires: Timestamp,
    made_by: String,
    used: Option<Used>,
}

#[derive(Serialize, Deserialize)]
struct Used {
    by: String,
    at: Timestamp,
    /// Tells the redemption that got no answer from any other.
    nonce: String,
}

/// What a token was good for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Redeemed {
    /// Name of the token.
    pub id: String,
    /// What its bearer may become.
    pub role: Role,
    /// Who made it.
    pub made_by: String,
}

fn encode(record: &Record) -> Result<Vec<u8>> {
    serde_json::to_vec(record).map_err(super::certificate)
}

/// Makes a token for one node, and forgets old ones.
pub async fn make_token(
    store: &dyn Store,
    authority: Fingerprint,
    role: Role,
    made_by: &str,
    ttl: Duration,
    now: Timestamp,
) -> Result<JoinToken> {
    forget_old(store, now).await?;
    let token = JoinToken { id: random()?, secret: random()?, fingerprint: authority };
    let expires = now.checked_add(ttl).map_err(|_| super::certificate("a token cannot live that long"))?;
    let record = Record { hash: hex::encode(token.hash()), role, expires, made_by: made_by.into(), used: None };
    let key = format!("{PREFIX}{}", token.id());
    // Put blindly: the name is new, and a token whose answer was lost is one that nobody has.
    let outcome = store.txn(vec![], vec![Op::put(key, encode(&record)?)]).await?;
    debug_assert!(outcome.succeeded);
    Ok(token)
}

/// Uses a token up, for the node called `by`. It succeeds for one caller only, whatever happens on the way; one that
/// fails with an error of the store may have used the token up.
pub async fn redeem_token(store: &dyn Store, token: &JoinToken, by: &str, now: Timestamp) -> Result<Redeemed> {
    let key = format!("{PREFIX}{}", token.id());
    let nonce = hex::encode(random::<16>()?);
    let mut doubt = None;
    for _ in 0..ATTEMPTS {
        let entry = store.get(key.as_bytes()).await?.ok_or(Error::TokenUnknown)?;
        let mut record: Record = serde_json::from_slice(&entry.value).map_err(|_| Error::TokenUnknown)?;
        let hash = hex::decode(&record.hash).map_err(|_| Error::TokenUnknown)?;
        verify_slices_are_equal(&hash, &token.hash()).map_err(|_| Error::TokenUnknown)?;
        let redeemed = Redeemed { id: token.id(), role: record.role, made_by: record.made_by.clone() };
        match &record.used {
            Some(used) if used.nonce == nonce => return Ok(redeemed),
            Some(used) => return Err(Error::TokenUsed { by: used.by.clone(), at: used.at }),
            None if record.expires <= now => return Err(Error::TokenExpired { at: record.expires }),
            None => {}
        }
        record.used = Some(Used { by: by.into(), at: now, nonce: nonce.clone() });
        match store.txn(vec![entry.unchanged()], vec![Op::put(key.clone(), encode(&record)?)]).await {
            Ok(outcome) if outcome.succeeded => return Ok(redeemed),
            // Somebody else's, or one of ours that got no answer: the next look tells.
            Ok(_) => {}
            Err(error @ StoreError::Indeterminate { .. }) => doubt = Some(error),
            Err(error) => return Err(error.into()),
        }
    }
    Err(doubt.unwrap_or_else(|| StoreError::unavailable(&store.location(), "the token is being changed")).into())
}

/// Makes a token useless. False if there is none of this name.
pub async fn revoke_token(store: &dyn Store, id: &str) -> Result<bool> {
    let Some(entry) = store.get(format!("{PREFIX}{id}").as_bytes()).await? else { return Ok(false) };
    let outcome = store.txn(vec![], vec![Op::delete(entry.key)]).await?;
    Ok(outcome.succeeded)
}

async fn forget_old(store: &dyn Store, now: Timestamp) -> Result<()> {
    let listing = store.list(PREFIX.as_bytes()).await?;
    let old = listing.entries.iter().filter(|entry| {
        let record: Result<Record, _> = serde_json::from_slice(&entry.value);
        record.is_ok_and(|record| {
            Duration::try_from(now.duration_since(record.expires)).is_ok_and(|age| age > REMEMBERED)
        })
    });
    for entry in old.take(crate::TXN_LEN_MAX) {
        let _ = store.txn(vec![entry.unchanged()], vec![Op::delete(entry.key.clone())]).await?;
    }
    Ok(())
}
