//! What comes with a request: bodies, queries, cursors. Everything bounded; every mistake named.

use axum::{
    body::Bytes,
    extract::{FromRequest, FromRequestParts, Path, Query, Request},
    http::{HeaderMap, header, request::Parts},
};
use serde::de::DeserializeOwned;
use virtward_api::{Code, FieldError, IDEMPOTENCY_KEY, Page, Principal, Problem};

use super::{BODY_BYTES_MAX, answer::Failed};
use crate::jobs::record::Idempotency;

/// A JSON body, with its bytes.
pub struct Body<T>(pub T, pub Bytes);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for Body<T> {
    type Rejection = Failed;

    async fn from_request(request: Request, _: &S) -> Result<Self, Failed> {
        let kind = request.headers().get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or("");
        let kind = kind.split(';').next().unwrap_or_default().trim();
        // Forms of other sites cannot send this type without asking first.
        if !kind.eq_ignore_ascii_case("application/json") {
            let detail = format!("the body is {kind:?}, not application/json");
            return Err(Problem::new(Code::UnsupportedMediaType, detail).into());
        }
        let bytes = axum::body::to_bytes(request.into_body(), BODY_BYTES_MAX).await.map_err(|_| {
            Problem::new(Code::TooLarge, format!("the body is larger than {BODY_BYTES_MAX} bytes, or broke off"))
        })?;
        match serde_json::from_slice(&bytes) {
            Ok(value) => Ok(Self(value, bytes)),
            Err(error) => Err(Problem::new(Code::BadRequest, format!("the body: {error}")).into()),
        }
    }
}

/// The query.
pub struct Params<T>(pub T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequestParts<S> for Params<T> {
    type Rejection = Failed;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Failed> {
        match Query::<T>::try_from_uri(&parts.uri) {
            Ok(Query(value)) => Ok(Self(value)),
            Err(error) => {
                use std::error::Error;
                let why = error.source().map_or_else(|| error.to_string(), ToString::to_string);
                Err(Problem::new(Code::BadRequest, format!("the query: {why}")).into())
            }
        }
    }
}

/// The one parameter of a path.
pub struct Name(pub String);

impl<S: Send + Sync> FromRequestParts<S> for Name {
    type Rejection = Failed;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Failed> {
        match Path::<String>::from_request_parts(parts, state).await {
            Ok(Path(name)) => Ok(Self(name)),
            Err(error) => Err(Problem::new(Code::BadRequest, format!("the path: {error}")).into()),
        }
    }
}

/// Who asks, as the guard found out.
pub struct Who(pub Principal);

impl<S: Send + Sync> FromRequestParts<S> for Who {
    type Rejection = Failed;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Failed> {
        let who = parts.extensions.get::<Principal>().cloned();
        Ok(Self(who.ok_or_else(|| Problem::new(Code::Unauthenticated, "nobody is logged in"))?))
    }
}

/// A parameter that is not right.
pub fn bad(name: &str, message: impl Into<String>) -> Problem {
    let message = message.into();
    let detail = format!("the parameter {name}: {message}");
    Problem::new(Code::BadRequest, detail).errors(vec![FieldError { field: name.into(), message, line: None }])
}

/// Items per page.
pub fn limit(asked: Option<usize>) -> Result<usize, Problem> {
    match asked {
        None => Ok(Page::<()>::LIMIT_DEFAULT),
        Some(limit @ 1..=Page::<()>::LIMIT_MAX) => Ok(limit),
        Some(_) => Err(bad("limit", "a number from 1 to 1000")),
    }
}

/// A word of a small set, as it is in JSON.
pub fn word<T: DeserializeOwned>(name: &str, text: &str) -> Result<T, Problem> {
    serde_json::from_value(text.into()).map_err(|error| bad(name, error.to_string()))
}

/// A cursor from the place of an item in the order.
pub fn cursor(place: &str) -> String {
    hex::encode(place)
}

/// The place that a cursor means.
pub fn place(cursor: &str) -> Result<String, Problem> {
    let bytes = hex::decode(cursor).ok().and_then(|bytes| String::from_utf8(bytes).ok());
    bytes.ok_or_else(|| bad("cursor", "this is not a cursor; give back `next` of the page before as it came"))
}

/// A page of items that are in the order of their places; `None` for the first page.
pub fn page<T>(items: Vec<(String, T)>, after: Option<&str>, limit: usize) -> Result<Page<T>, Problem> {
    let after = after.map(place).transpose()?;
    let total = Some(items.len() as u64);
    let mut rest = items.into_iter().filter(|(place, _)| after.as_ref().is_none_or(|after| place > after));
    let mut taken: Vec<(String, T)> = rest.by_ref().take(limit).collect();
    let more = rest.next().is_some();
    let next = more.then(|| taken.last().map(|(place, _)| cursor(place))).flatten();
    Ok(Page { items: taken.drain(..).map(|(_, item)| item).collect(), next, total, missing: Vec::new() })
}

/// The idempotency key of a request, bound to who asks and what for.
pub fn idempotency(
    headers: &HeaderMap,
    who: &Principal,
    path: &str,
    body: &[u8],
) -> Result<Option<Idempotency>, Problem> {
    let Some(value) = headers.get(IDEMPOTENCY_KEY) else { return Ok(None) };
    let key =
        value.to_str().ok().filter(|key| (1..=200).contains(&key.len()) && key.bytes().all(|b| b.is_ascii_graphic()));
    let key = key.ok_or_else(|| bad(IDEMPOTENCY_KEY, "1 to 200 visible ASCII characters"))?;
    let mut hasher = blake3::Hasher::new();
    for part in [who.name.as_bytes(), format!("{:?}", who.kind).as_bytes(), key.as_bytes()] {
        hasher.update(&(part.len() as u64).to_le_bytes());
        hasher.update(part);
    }
    let mut request = blake3::Hasher::new();
    request.update(path.as_bytes());
    request.update(b"\0");
    request.update(body);
    Ok(Some(Idempotency {
        key: hasher.finalize().to_hex().to_string(),
        request: request.finalize().to_hex().to_string(),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_repeat_nothing_and_leave_nothing_out() {
        let items = |n: usize| (0..n).map(|i| (format!("{i:04}"), i)).collect::<Vec<_>>();
        let (mut seen, mut after): (Vec<usize>, Option<String>) = (Vec::new(), None);
        loop {
            let page = page(items(25), after.as_deref(), 10).unwrap();
            assert_eq!(page.total, Some(25));
            seen.extend(page.items);
            after = page.next;
            if after.is_none() {
                break;
            }
        }
        assert_eq!(seen, (0..25).collect::<Vec<_>>());
        // A whole last page has no next one.
        assert_eq!(page(items(10), None, 10).unwrap().next, None);
        for wrong in ["x", "0", "ff", "zz"] {
            assert!(page(items(1), Some(wrong), 10).is_err(), "{wrong}");
        }
    }
}
