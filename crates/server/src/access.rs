//! Tokens and sessions: who somebody is, by what they show.
//!
//! A token is `vwt_ID_SECRET`; only a hash of the secret is kept, and 32 random bytes need no slow one. A session is a
//! random cookie, of which a hash is kept too; it ends with its token. A CSRF token follows from the cookie, so that
//! nothing else has to be kept. Failures are counted per address.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};
use virtward_api::{Code, NewToken, Principal, PrincipalKind, Problem, Token};
use virtward_cluster::Compare;

use crate::{
    failures::Result,
    jobs::{
        made_key,
        record::{Idempotency, Made},
    },
    kv::{self, Kv},
    table::Table,
};

const TOKEN_PREFIX: &str = "vwt_";
const TOKENS_MAX: usize = 10_000;
const LIFE_DEFAULT_S: u64 = 90 * 86_400;
const LIFE_MAX_S: u64 = 3653 * 86_400;
/// Longest life of a session.
const SESSION_LIFE: SignedDuration = SignedDuration::from_hours(12);
/// Failures that one address may have in a minute.
const FAILURES_MAX: usize = 10;
const FAILURES_OVER: Duration = Duration::from_secs(60);
/// Addresses that are remembered; beyond, all count as one.
const ADDRESSES_MAX: usize = 10_000;

/// A token as it is kept.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct StoredToken {
    token: Token,
    /// BLAKE3 of the secret, in hex.
    hash: String,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct StoredSession {
    token: String,
    expires: Timestamp,
}

/// Tokens and sessions.
pub struct Access {
    kv: Kv,
    /// As they are stored, by id.
    pub table: Table<String, StoredToken>,
    failures: Mutex<HashMap<Option<IpAddr>, Vec<Instant>>>,
    changing: tokio::sync::Mutex<()>,
}

fn token_key(id: &str) -> String {
    format!("/v1/tokens/{id}")
}

fn session_key(cookie: &str) -> String {
    format!("/v1/sessions/{}", blake3::hash(cookie.as_bytes()).to_hex())
}

/// Random bytes in hex.
fn random(bytes: usize) -> Result<String> {
    let mut buffer = vec![0; bytes];
    getrandom::fill(&mut buffer)
        .map_err(|error| Problem::new(Code::Unavailable, format!("the system gives no random numbers: {error}")))?;
    Ok(hex::encode(buffer))
}

/// What a page that logged in sends with every change.
pub fn csrf_token(cookie: &str) -> String {
    blake3::derive_key("virtward 2026 CSRF token of a session", cookie.as_bytes())[..16]
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

/// Compares without telling by time how much is equal.
pub fn is_equal(one: &str, other: &str) -> bool {
    // blake3::Hash compares in constant time.
    blake3::hash(one.as_bytes()) == blake3::hash(other.as_bytes())
}

fn unknown() -> Problem {
    Problem::new(Code::Unauthenticated, "the token or session is not valid, or not any more")
        .hint("log in again, or make a token with virtward token create on the host")
}

impl Access {
    /// Those of the state store.
    pub async fn load(kv: Kv) -> Result<Self> {
        let table = Table::load(&kv, "/v1/tokens/").await?;
        Ok(Self { kv, table, failures: Mutex::default(), changing: tokio::sync::Mutex::new(()) })
    }

    /// Every token, by name.
    pub fn tokens(&self) -> Vec<Token> {
        let mut all: Vec<Token> = self.table.values().iter().map(|stored| stored.token.clone()).collect();
        all.sort_by(|a, b| a.name.cmp(&b.name));
        all
    }

    fn token(&self, id: &str) -> Option<Arc<StoredToken>> {
        let now = Timestamp::now();
        self.table.get(&id.to_owned()).filter(|stored| stored.token.expires.is_none_or(|expires| expires > now))
    }

    /// Makes a token; its secret, unless the same request made it before.
    pub async fn create(
        &self,
        new: &NewToken,
        who: &str,
        again: Option<&Idempotency>,
    ) -> Result<(Token, Option<String>)> {
        let _one = self.changing.lock().await;
        if let Some(token) = self.made_before(again).await? {
            return Ok((token, None));
        }
        check(new)?;
        let all = self.tokens();
        if all.iter().any(|token| token.name == new.name) {
            return Err(Problem::new(Code::Conflict, format!("there is a token called {:?} already", new.name))
                .hint("revoke it first, or choose another name"));
        }
        if all.len() >= TOKENS_MAX {
            return Err(Problem::new(Code::Conflict, format!("there are {} tokens; revoke some", all.len())));
        }
        let (id, secret) = (random(8)?, random(32)?);
        let now = Timestamp::now();
        let life = new.expires_in_s.unwrap_or(LIFE_DEFAULT_S).min(LIFE_MAX_S);
        let life = SignedDuration::from_secs(i64::try_from(life).unwrap_or(0));
        let token = Token {
            id: id.clone(),
            name: new.name.clone(),
            role: new.role,
            vm_tags: new.vm_tags.clone(),
            created: now,
            created_by: who.to_owned(),
            expires: now.checked_add(life).ok(),
        };
        let stored = StoredToken { token: token.clone(), hash: blake3::hash(secret.as_bytes()).to_hex().to_string() };
        let mut compares = vec![Compare::absent(token_key(&id))];
        let mut ops = vec![kv::put(&token_key(&id), &stored)?];
        if let Some(again) = again {
            compares.push(Compare::absent(made_key(&again.key)));
            ops.push(kv::put(
                &made_key(&again.key),
                &Made { request: again.request.clone(), id: id.clone(), at: now },
            )?);
        }
        let Some(at) = self.kv.commit(compares, ops).await? else {
            return Err(Problem::new(Code::Conflict, "another request with this idempotency key is under way"));
        };
        self.table.put(id.clone(), at, stored);
        Ok((token, Some(format!("{TOKEN_PREFIX}{id}_{secret}"))))
    }

    async fn made_before(&self, again: Option<&Idempotency>) -> Result<Option<Token>> {
        let Some(again) = again else { return Ok(None) };
        let Some((made, _)) = self.kv.get::<Made>(&made_key(&again.key)).await? else { return Ok(None) };
        match self.token(&made.id).filter(|_| made.request == again.request) {
            Some(stored) => Ok(Some(stored.token.clone())),
            None => Err(Problem::new(Code::IdempotencyMismatch, "this idempotency key was used for another request")
                .hint("use a new key for a new request")),
        }
    }

    /// Ends a token, and the sessions that began with it.
    pub async fn revoke(&self, id_or_name: &str) -> Result<Token> {
        let _one = self.changing.lock().await;
        let found = self.tokens().into_iter().find(|token| token.id == id_or_name || token.name == id_or_name);
        let Some(token) = found else {
            return Err(Problem::new(Code::NotFound, format!("there is no token {id_or_name}"))
                .hint("virtward token list shows what there is"));
        };
        if let Some(at) = self.kv.delete(&[token_key(&token.id)]).await? {
            self.table.delete(&token.id, at);
        }
        Ok(token)
    }

    /// Who shows this token.
    pub fn by_token(&self, text: &str) -> Result<Principal> {
        let parts = text.strip_prefix(TOKEN_PREFIX).and_then(|rest| rest.split_once('_'));
        let (id, secret) = parts.ok_or_else(unknown)?;
        let stored = self.token(id).ok_or_else(unknown)?;
        let is_right = blake3::Hash::from_hex(&stored.hash).is_ok_and(|hash| hash == blake3::hash(secret.as_bytes()));
        if !is_right {
            return Err(unknown());
        }
        Ok(principal(&stored.token, PrincipalKind::Token))
    }

    /// Begins a session; its cookie.
    pub async fn log_in(&self, text: &str) -> Result<(Principal, String)> {
        let who = self.by_token(text)?;
        let id = text.strip_prefix(TOKEN_PREFIX).and_then(|rest| rest.split_once('_')).map_or("", |(id, _)| id);
        let latest = Timestamp::now().checked_add(SESSION_LIFE).unwrap_or(Timestamp::MAX);
        let expires = who.expires.map_or(latest, |expires| expires.min(latest));
        let cookie = random(32)?;
        _ = self.kv.put(&session_key(&cookie), &StoredSession { token: id.to_owned(), expires }).await?;
        let csrf_token = Some(csrf_token(&cookie));
        Ok((Principal { kind: PrincipalKind::Session, expires: Some(expires), csrf_token, ..who }, cookie))
    }

    /// Whose session this is.
    pub async fn by_cookie(&self, cookie: &str) -> Result<Principal> {
        let found = self.kv.get::<StoredSession>(&session_key(cookie)).await?;
        let session = found.map(|(session, _)| session).filter(|session| session.expires > Timestamp::now());
        let session = session.ok_or_else(unknown)?;
        let stored = self.token(&session.token).ok_or_else(unknown)?;
        let who = principal(&stored.token, PrincipalKind::Session);
        Ok(Principal { expires: Some(session.expires), csrf_token: Some(csrf_token(cookie)), ..who })
    }

    /// Ends a session.
    pub async fn log_out(&self, cookie: &str) -> Result<()> {
        self.kv.delete(&[session_key(cookie)]).await.map(|_| ())
    }

    /// Whether an address failed too often of late; if so, how many seconds to wait.
    pub fn is_limited(&self, address: Option<IpAddr>) -> Option<u64> {
        let mut failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        let recent = failures.get_mut(&address)?;
        let now = Instant::now();
        recent.retain(|at| now.duration_since(*at) < FAILURES_OVER);
        let oldest = *recent.first().filter(|_| recent.len() >= FAILURES_MAX)?;
        Some(FAILURES_OVER.saturating_sub(now.duration_since(oldest)).as_secs() + 1)
    }

    /// Counts a failure.
    pub fn failed(&self, address: Option<IpAddr>) {
        let mut failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        if failures.len() >= ADDRESSES_MAX {
            failures.retain(|_, at| at.iter().any(|at| now.duration_since(*at) < FAILURES_OVER));
        }
        let address = address.filter(|_| failures.len() < ADDRESSES_MAX);
        let recent = failures.entry(address).or_default();
        if recent.len() < FAILURES_MAX {
            recent.push(now);
        }
    }

    /// Forgets sessions and tokens that have ended.
    pub async fn prune(&self) -> Result<()> {
        let now = Timestamp::now();
        let sessions = self.kv.list::<StoredSession>("/v1/sessions/").await?;
        let over = sessions.into_iter().filter(|(_, session)| session.expires <= now);
        self.kv.delete(&over.map(|(key, _)| key).collect::<Vec<_>>()).await.map(|_| ())
    }
}

fn principal(token: &Token, kind: PrincipalKind) -> Principal {
    Principal {
        name: token.name.clone(),
        kind,
        role: token.role,
        vm_tags: token.vm_tags.clone(),
        expires: token.expires,
        csrf_token: None,
    }
}

fn check(new: &NewToken) -> Result<()> {
    let refuse = |field: &str, message: &str| {
        let error = virtward_api::FieldError { field: field.into(), message: message.into(), line: None };
        Err(Problem::new(Code::Invalid, format!("{field}: {message}")).errors(vec![error]))
    };
    let name = new.name.trim();
    if name.is_empty() || name != new.name || name.chars().count() > 100 || name.chars().any(char::is_control) {
        return refuse("name", "1 to 100 characters, without spaces at its ends");
    }
    if new.vm_tags.len() > 100 || new.vm_tags.iter().any(|tag| tag.is_empty() || tag.len() > 200) {
        return refuse("vm_tags", "at most 100 tags of 1 to 200 bytes");
    }
    match new.expires_in_s {
        Some(0) => refuse("expires_in_s", "at least one second"),
        Some(life) if life > LIFE_MAX_S => refuse("expires_in_s", "at most ten years"),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use virtward_api::Role;
    use virtward_cluster::MemStore;

    use super::*;

    async fn access() -> Access {
        Access::load(Kv::new(Arc::new(MemStore::new()))).await.unwrap()
    }

    fn new(name: &str) -> NewToken {
        NewToken { name: name.into(), role: Role::Operator, vm_tags: vec!["gold".into()], expires_in_s: None }
    }

    #[tokio::test]
    async fn a_token_is_known_until_it_is_revoked_and_its_secret_is_not_kept() {
        let access = access().await;
        let (token, secret) = access.create(&new("ci"), "root", None).await.unwrap();
        let secret = secret.unwrap();
        let who = access.by_token(&secret).unwrap();
        assert_eq!((who.name.as_str(), who.role, who.kind), ("ci", Role::Operator, PrincipalKind::Token));
        let kept = access.kv.list::<serde_json::Value>("/v1/tokens/").await.unwrap();
        assert!(!format!("{kept:?}").contains(secret.rsplit('_').next().unwrap()));
        for wrong in ["", "vwt_", &secret[..secret.len() - 1], &format!("{secret}0"), &secret.replace("vwt_", "")] {
            assert_eq!(access.by_token(wrong).unwrap_err().code, Code::Unauthenticated, "{wrong}");
        }
        let again = Access::load(access.kv.clone()).await.unwrap();
        assert!(again.by_token(&secret).is_ok());
        let (_, cookie) = access.log_in(&secret).await.unwrap();
        assert_eq!(access.by_cookie(&cookie).await.unwrap().csrf_token, Some(csrf_token(&cookie)));
        access.revoke(&token.name).await.unwrap();
        assert!(access.by_token(&secret).is_err());
        assert!(access.by_cookie(&cookie).await.is_err(), "a session ends with its token");
    }

    #[tokio::test]
    async fn tokens_end_and_names_are_unique() {
        let access = access().await;
        let short = NewToken { expires_in_s: Some(1), ..new("short") };
        let (_, secret) = access.create(&short, "root", None).await.unwrap();
        let secret = secret.unwrap();
        assert!(access.by_token(&secret).is_ok());
        tokio::time::sleep(Duration::from_millis(1100)).await;
        assert!(access.by_token(&secret).is_err());
        assert_eq!(access.create(&short, "root", None).await.unwrap_err().code, Code::Conflict);
        for bad in ["", " x", "a\nb", &"x".repeat(101)] {
            assert_eq!(access.create(&new(bad), "root", None).await.unwrap_err().code, Code::Invalid, "{bad:?}");
        }
        assert!(access.create(&NewToken { expires_in_s: Some(0), ..new("zero") }, "root", None).await.is_err());
    }

    #[tokio::test]
    async fn failures_of_one_address_do_not_lock_out_another() {
        let access = access().await;
        let (one, two) = (Some(IpAddr::from([127, 0, 0, 1])), Some(IpAddr::from([127, 0, 0, 2])));
        for _ in 0..FAILURES_MAX {
            assert_eq!(access.is_limited(one), None);
            access.failed(one);
        }
        assert!(access.is_limited(one).is_some_and(|wait| wait <= 61));
        assert_eq!(access.is_limited(two), None);
    }
}
