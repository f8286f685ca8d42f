//! Mail by SMTP, as text.

use std::{sync::Arc, time::Duration};

use lettre::{
    AsyncSmtpTransport, AsyncTransport, Tokio1Executor,
    message::{
        Mailbox,
        header::{ContentType, HeaderName, HeaderValue},
    },
    transport::smtp::{
        authentication::Credentials,
        client::{Certificate, CertificateStore, Tls, TlsParameters},
        extension::ClientId,
    },
};
use virtward_api::Severity;

use super::{Failure, message::Message, trust};
use crate::config::{MailConfig, MailTls};

/// For each command and its answer.
const TIME_MAX: Duration = Duration::from_secs(20);
/// For all of one try: less than a request to the API may take.
const TRY_MAX: Duration = Duration::from_secs(40);

/// Sends a message to all recipients.
pub async fn send(config: &MailConfig, message: &Arc<Message>) -> Result<(), Failure> {
    let at = format!("{}:{}", config.server, config.port);
    let mail = compose(config, message)?;
    let transport = transport(config, &message.node)?;
    match tokio::time::timeout(TRY_MAX, transport.send(mail)).await {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(error)) => {
            let mut text = format!("{at}: {error}");
            let mut cause = std::error::Error::source(&error);
            while let Some(inner) = cause {
                if !text.contains(&inner.to_string()) {
                    text = format!("{text}: {inner}");
                }
                cause = inner.source();
            }
            // A mail server that refuses for good says so itself; everything else may pass.
            Err(Failure { text: trust::explained(&text), is_final: error.is_permanent() || error.is_client() })
        }
        Err(_) => Err(Failure::passing(format!("{at}: no answer in time"))),
    }
}

/// An address that mail can be sent to or from, as people write it.
pub fn mailbox(text: &str) -> Result<Mailbox, String> {
    text.parse::<Mailbox>().map_err(|error| format!("{text:?} is no mail address: {error}"))
}

fn compose(config: &MailConfig, message: &Message) -> Result<lettre::Message, Failure> {
    let from = mailbox(&config.from).map_err(Failure::lasting)?;
    let word = match message.severity {
        Severity::Info => "info",
        Severity::Warning => "warning",
        Severity::Error => "error",
    };
    // The same for every try: servers that keep track drop what comes twice.
    let id = format!("<{}@{}>", message.id, from.email.domain());
    let automatic = HeaderValue::new(HeaderName::new_from_ascii_str("Auto-Submitted"), "auto-generated".into());
    let mut builder = lettre::Message::builder()
        .from(from)
        .message_id(Some(id))
        .subject(format!("[virtward {}] {word}: {}", message.node, message.title))
        .raw_header(automatic)
        .header(ContentType::TEXT_PLAIN);
    for to in &config.to {
        builder = builder.to(mailbox(to).map_err(Failure::lasting)?);
    }
    builder.body(message.text.clone()).map_err(|error| Failure::lasting(format!("the mail cannot be written: {error}")))
}

fn transport(config: &MailConfig, node: &str) -> Result<AsyncSmtpTransport<Tokio1Executor>, Failure> {
    let tls = match config.tls {
        MailTls::None => Tls::None,
        MailTls::StartTls => Tls::Required(parameters(config)?),
        MailTls::Implicit => Tls::Wrapper(parameters(config)?),
    };
    let builder = AsyncSmtpTransport::<Tokio1Executor>::builder_dangerous(&config.server)
        .port(config.port)
        .timeout(Some(TIME_MAX))
        .hello_name(ClientId::Domain(node.to_owned()))
        .tls(tls);
    let builder = match &config.login {
        None => builder,
        Some((user, file)) => builder.credentials(Credentials::new(user.clone(), trust::secret(file)?)),
    };
    Ok(builder.build())
}

fn parameters(config: &MailConfig) -> Result<TlsParameters, Failure> {
    let mut builder = TlsParameters::builder(config.server.clone()).certificate_store(CertificateStore::None);
    for certificate in trust::certificates(config.ca_file.as_deref())? {
        let certificate = Certificate::from_der(certificate.to_vec());
        builder = builder.add_root_certificate(certificate.map_err(|error| Failure::lasting(error.to_string()))?);
    }
    builder.build().map_err(|error| Failure::lasting(format!("TLS to {}: {error}", config.server)))
}
