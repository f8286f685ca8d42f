//! AWS Signature Version 4: which request was made, proven with a secret that is never sent.
//!
//! Everything that matters is signed: method, path, query, all headers that this crate sets, and the hash of the body.
//! Headers and not URLs carry the signature, because URLs end up in logs and error messages.

use aws_lc_rs::{digest, hmac};
use jiff::{Timestamp, tz::TimeZone};
use zeroize::Zeroizing;

/// Who asks.
#[derive(Clone)]
pub struct Credentials {
    /// Public name of the key.
    pub access_key: String,
    /// The secret.
    pub secret_key: Zeroizing<String>,
    /// For temporary credentials.
    pub session_token: Option<Zeroizing<String>>,
}

impl std::fmt::Debug for Credentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Credentials({}, secret not shown)", self.access_key)
    }
}

/// What is signed.
pub struct Unsigned<'a> {
    pub method: &'a str,
    /// Percent-encoded.
    pub path: &'a str,
    /// From [`query`].
    pub query: &'a str,
    pub host: &'a str,
    /// Further headers, names in lower case.
    pub headers: &'a [(&'a str, &'a str)],
    pub body: &'a [u8],
}

/// Headers to add to the request.
pub type Headers = Vec<(&'static str, String)>;

/// Signs a request.
pub fn sign(credentials: &Credentials, region: &str, now: Timestamp, request: &Unsigned<'_>) -> Headers {
    let time = now.to_zoned(TimeZone::UTC).strftime("%Y%m%dT%H%M%SZ").to_string();
    let date = &time[..8];
    let body_hash = hex::encode(digest::digest(&digest::SHA256, request.body));
    let mut added: Headers = vec![("x-amz-content-sha256", body_hash.clone()), ("x-amz-date", time.clone())];
    if let Some(token) = &credentials.session_token {
        added.push(("x-amz-security-token", token.to_string()));
    }
    let mut headers: Vec<(&str, &str)> = vec![("host", request.host)];
    headers.extend(request.headers);
    headers.extend(added.iter().map(|(name, value)| (*name, &**value)));
    headers.sort_unstable();
    let names: Vec<&str> = headers.iter().map(|(name, _)| *name).collect();
    let names = names.join(";");
    let lines: String = headers.iter().map(|(name, value)| format!("{name}:{}\n", value.trim())).collect();
    let canonical = format!("{}\n{}\n{}\n{lines}\n{names}\n{body_hash}", request.method, request.path, request.query);
    let scope = format!("{date}/{region}/s3/aws4_request");
    let hash = hex::encode(digest::digest(&digest::SHA256, canonical.as_bytes()));
    let text = format!("AWS4-HMAC-SHA256\n{time}\n{scope}\n{hash}");
    let first = Zeroizing::new(format!("AWS4{}", &*credentials.secret_key));
    let mut key = mac(first.as_bytes(), date.as_bytes());
    for part in [region, "s3", "aws4_request"] {
        key = mac(key.as_ref(), part.as_bytes());
    }
    let signature = hex::encode(mac(key.as_ref(), text.as_bytes()));
    let access_key = &credentials.access_key;
    added.push((
        "authorization",
        format!("AWS4-HMAC-SHA256 Credential={access_key}/{scope},SignedHeaders={names},Signature={signature}"),
    ));
    added
}

fn mac(key: &[u8], text: &[u8]) -> hmac::Tag {
    hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, key), text)
}

/// Percent-encodes what is not unreserved in RFC 3986; slashes only on demand.
pub fn encode(text: &str, keep_slash: bool) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) || (keep_slash && byte == b'/') {
            out.push(byte.into());
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out
}

/// A query as it is both signed and sent.
pub fn query(pairs: &[(&str, &str)]) -> String {
    let mut pairs: Vec<_> = pairs.iter().map(|(k, v)| (encode(k, false), encode(v, false))).collect();
    pairs.sort_unstable();
    pairs.iter().map(|(k, v)| format!("{k}={v}")).collect::<Vec<_>>().join("&")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The example of the specification: AWS, "Signature Calculations for the Authorization Header", GET Object and GET
    /// Bucket (List Objects).
    fn example() -> (Credentials, Timestamp) {
        let credentials = Credentials {
            access_key: "AKIAIOSFODNN7EXAMPLE".into(),
            secret_key: Zeroizing::new("wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY".into()),
            session_token: None,
        };
        (credentials, "2013-05-24T00:00:00Z".parse().unwrap())
    }

    fn signature(request: &Unsigned<'_>) -> String {
        let (credentials, now) = example();
        let headers = sign(&credentials, "us-east-1", now, request);
        headers.last().unwrap().1.rsplit_once("Signature=").unwrap().1.to_owned()
    }

    #[test]
    fn the_examples_of_the_specification_come_out() {
        let host = "examplebucket.s3.amazonaws.com";
        let get = Unsigned {
            method: "GET",
            path: "/test.txt",
            query: "",
            host,
            headers: &[("range", "bytes=0-9")],
            body: b"",
        };
        assert_eq!(signature(&get), "f0e8bdb87c964420e857bd35b5d6ed310bd44f0170aba48dd91039c6036bdb41");
        let list = Unsigned { path: "/", query: &query(&[("prefix", "J"), ("max-keys", "2")]), headers: &[], ..get };
        assert_eq!(signature(&list), "34b48302e7b5fa45bde8084f4b7868a86f0a534bc59db6670ed5711ef69dc6f7");
    }

    #[test]
    fn secrets_are_not_shown() {
        let (mut credentials, _) = example();
        credentials.session_token = Some(Zeroizing::new("token".into()));
        let shown = format!("{credentials:?}");
        assert!(!shown.contains("wJalr") && !shown.contains("token"), "{shown}");
    }

    #[test]
    fn only_unreserved_characters_stay() {
        assert_eq!(encode("a/B-c_d.e~f ü+", true), "a/B-c_d.e~f%20%C3%BC%2B");
        assert_eq!(encode("a/b", false), "a%2Fb");
    }
}
