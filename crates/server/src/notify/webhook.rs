//! Webhooks: a POST of JSON, signed as standardwebhooks.com says, so that receivers can use any of its libraries:
//! `webhook-signature: v1,BASE64(HMAC-SHA256(secret, ID.TIMESTAMP.BODY))`.

use std::{sync::Arc, time::Duration};

use aws_lc_rs::hmac;
use base64::{Engine, engine::general_purpose::STANDARD};
use jiff::Timestamp;
use ureq::{Agent, http::Uri};

use super::{Failure, message::Message, trust};
use crate::config::{MaybeSecret, WebhookConfig};

/// For all of one try.
const TIME_MAX: Duration = Duration::from_secs(20);
/// What is read of an answer, for the message if it was no.
const ANSWER_BYTES_MAX: u64 = 4 << 10;
/// Characters of an answer that are shown.
const SHOWN_MAX: usize = 200;
/// Secrets that begin so are base64.
const SECRET_PREFIX: &str = "whsec_";

/// Where it goes, without the path: that is often the secret.
pub fn origin(config: &WebhookConfig) -> String {
    match &config.url {
        MaybeSecret::File(path) => format!("the URL in {}", path.display()),
        MaybeSecret::Here(url) => origin_of(url),
    }
}

fn origin_of(url: &str) -> String {
    match url.parse::<Uri>() {
        Ok(uri) => {
            let authority = uri.authority().map_or("", |authority| authority.as_str());
            let host = authority.rsplit('@').next().unwrap_or_default();
            format!("{}://{host}", uri.scheme_str().unwrap_or_default())
        }
        Err(_) => "a URL that cannot be read".into(),
    }
}

/// Sends a message.
pub async fn send(config: &WebhookConfig, message: &Arc<Message>) -> Result<(), Failure> {
    let (config, message) = (config.clone(), message.clone());
    let sent = tokio::task::spawn_blocking(move || post(&config, &message));
    sent.await.unwrap_or_else(|error| Err(Failure::passing(format!("a worker thread ended early: {error}"))))
}

fn post(config: &WebhookConfig, message: &Message) -> Result<(), Failure> {
    let url = match &config.url {
        MaybeSecret::Here(url) => url.clone(),
        MaybeSecret::File(path) => trust::secret(path)?,
    };
    let at = origin_of(&url);
    let body = serde_json::to_vec(message).map_err(|error| Failure::lasting(error.to_string()))?;
    let timestamp = Timestamp::now().as_second().to_string();
    let agent = agent(config, &url)?;
    let mut request = agent
        .post(&url)
        .header("content-type", "application/json")
        .header("user-agent", concat!("virtward/", env!("CARGO_PKG_VERSION")))
        .header("webhook-id", &message.id)
        .header("webhook-timestamp", &timestamp);
    if let Some(path) = &config.secret_file {
        let signature = sign(&trust::secret(path)?, &message.id, &timestamp, &body)?;
        request = request.header("webhook-signature", signature);
    }
    if let Some(path) = &config.token_file {
        request = request.header("authorization", format!("Bearer {}", trust::secret(path)?));
    }
    let mut answer = request.send(&body[..]).map_err(|error| Failure::passing(format!("{at}: {}", shown(&error))))?;
    let status = answer.status().as_u16();
    if (200..300).contains(&status) {
        return Ok(());
    }
    let said = answer.body_mut().with_config().limit(ANSWER_BYTES_MAX).read_to_vec().unwrap_or_default();
    let said: String =
        String::from_utf8_lossy(&said).chars().filter(|letter| !letter.is_control()).take(SHOWN_MAX).collect();
    let text = format!("{at} answered {status}{}{said}", if said.is_empty() { "" } else { ": " });
    match status {
        408 | 425 | 429 | 500..=599 => Err(Failure::passing(text)),
        300..=399 => Err(Failure::lasting(format!("{text}; it leads elsewhere: name the final address"))),
        _ => Err(Failure::lasting(text)),
    }
}

fn agent(config: &WebhookConfig, url: &str) -> Result<Agent, Failure> {
    let builder = Agent::config_builder()
        .http_status_as_error(false)
        .max_redirects(0)
        .max_redirects_will_error(false)
        .timeout_global(Some(TIME_MAX))
        .tls_config(trust::tls(url, config.ca_file.as_deref())?);
    Ok(Agent::new_with_config(builder.build()))
}

/// Without the URL, which some errors carry.
fn shown(error: &ureq::Error) -> String {
    match error {
        ureq::Error::BadUri(_) => "the URL is none; give one such as https://host/path".into(),
        ureq::Error::HostNotFound => "its name is not known".into(),
        ureq::Error::Timeout(_) => "no answer in time".into(),
        ureq::Error::Io(error) => trust::explained(&error.to_string()),
        ureq::Error::Rustls(error) => trust::explained(&error.to_string()),
        other => other.to_string(),
    }
}

/// What the header `webhook-signature` says.
fn sign(secret: &str, id: &str, timestamp: &str, body: &[u8]) -> Result<String, Failure> {
    let key = match secret.strip_prefix(SECRET_PREFIX) {
        Some(encoded) => STANDARD.decode(encoded).map_err(|_| {
            Failure::lasting(format!("the secret begins with {SECRET_PREFIX} and is no base64 after that"))
        })?,
        None => secret.as_bytes().to_vec(),
    };
    let key = hmac::Key::new(hmac::HMAC_SHA256, &key);
    let mut context = hmac::Context::with_key(&key);
    for part in [id.as_bytes(), b".", timestamp.as_bytes(), b".", body] {
        context.update(part);
    }
    Ok(format!("v1,{}", STANDARD.encode(context.sign())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_signature_is_that_of_the_standard() {
        // The example of https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md
        let secret = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
        let signature = sign(secret, "msg_p5jXN8AQM9LWM0D4loKWxJek", "1614265330", b"{\"test\": 2432232314}").unwrap();
        assert_eq!(signature, "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=");
        assert!(sign("whsec_?", "m", "1", b"").unwrap_err().is_final);
    }

    #[test]
    fn what_is_secret_in_a_url_is_not_shown() {
        for (url, shown) in [
            ("https://hooks.example.com/services/T0/B0/secret", "https://hooks.example.com"),
            ("http://user:pw@10.0.0.1:8080/x?token=1", "http://10.0.0.1:8080"),
            ("nonsense at all", "a URL that cannot be read"),
        ] {
            assert_eq!(origin_of(url), shown);
        }
    }
}
