//! `[notify]` of the configuration: whom the daemon tells of what happens. From the file's words to what the daemon is
//! told; defaults and refusals are here.

use std::{collections::BTreeMap, path::PathBuf, time::Duration};

use serde::Deserialize;
use virtward_decide::notify::{Level, Rules};
use virtward_model::Seconds;
use virtward_server::{
    config::{ChannelConfig, MailConfig, MailTls, MaybeSecret, NotifyConfig, Target, WebhookConfig},
    notify,
};

use crate::exit::{Failure, Kind};

/// `[notify]`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct Notify {
    /// Nothing that matters less is told.
    pub severity: Option<Severity>,
    /// How long the first event waits for others.
    pub group_wait: Option<Seconds>,
    /// Least time between two messages of a channel.
    pub group_interval: Option<Seconds>,
    /// Least time until the same trouble is told again.
    pub repeat_after: Option<Seconds>,
    /// Whether the end of a trouble that was told is told.
    pub recoveries: Option<bool>,
    /// Kinds of events that are not told.
    pub exclude: Vec<String>,
    /// Where the web interface is, for links in messages.
    pub link: Option<String>,
    /// Webhooks by name.
    pub webhook: BTreeMap<String, Webhook>,
    /// Mail by name.
    pub mail: BTreeMap<String, Mail>,
}

/// How much an event has to matter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[allow(missing_docs)]
pub enum Severity {
    Info,
    Warning,
    Error,
}

/// `[notify.webhook.NAME]`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
#[allow(missing_docs)]
pub struct Webhook {
    pub url: Option<String>,
    pub url_file: Option<PathBuf>,
    pub secret_file: Option<PathBuf>,
    pub token_file: Option<PathBuf>,
    pub ca_file: Option<PathBuf>,
    pub severity: Option<Severity>,
    pub exclude: Vec<String>,
}

/// `[notify.mail.NAME]`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
#[allow(missing_docs)]
pub struct Mail {
    pub server: String,
    pub port: Option<u16>,
    pub tls: Option<Tls>,
    pub ca_file: Option<PathBuf>,
    pub user: Option<String>,
    pub password_file: Option<PathBuf>,
    pub from: String,
    pub to: Vec<String>,
    pub severity: Option<Severity>,
    pub exclude: Vec<String>,
}

/// How the connection to a mail server is protected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[allow(missing_docs)]
pub enum Tls {
    Starttls,
    Implicit,
    None,
}

/// Every key of the section, and of the two below it.
pub const KEYS: [(&str, &[&str]); 3] = [
    (
        "notify",
        &[
            "severity",
            "group-wait",
            "group-interval",
            "repeat-after",
            "recoveries",
            "exclude",
            "link",
            "webhook",
            "mail",
        ],
    ),
    ("webhook.NAME", &["url", "url-file", "secret-file", "token-file", "ca-file", "severity", "exclude"]),
    ("mail.NAME", &["server", "port", "tls", "ca-file", "user", "password-file", "from", "to", "severity", "exclude"]),
];

fn level(severity: Severity) -> Level {
    match severity {
        Severity::Info => Level::Info,
        Severity::Warning => Level::Warning,
        Severity::Error => Level::Error,
    }
}

/// What the daemon is told.
pub fn settle(notify: &Notify) -> Result<NotifyConfig, Failure> {
    let rules = |severity: Option<Severity>, exclude: &[String]| {
        let time = |given: Option<Seconds>, default: u64| Duration::from_secs(given.map_or(default, |given| given.0));
        Rules {
            severity: level(severity.or(notify.severity).unwrap_or(Severity::Warning)),
            group_wait: time(notify.group_wait, 30),
            group_interval: time(notify.group_interval, 5 * 60),
            repeat_after: time(notify.repeat_after, 12 * 3600),
            recoveries: notify.recoveries.unwrap_or(true),
            exclude: notify.exclude.iter().chain(exclude).cloned().collect(),
        }
    };
    let mut channels = Vec::new();
    for (name, hook) in &notify.webhook {
        let target = Target::Webhook(webhook(hook).map_err(|why| wrong("webhook", name, &why))?);
        channels.push(ChannelConfig { name: name.clone(), rules: rules(hook.severity, &hook.exclude), target });
    }
    for (name, mail) in &notify.mail {
        if notify.webhook.contains_key(name) {
            return Err(wrong("mail", name, "a webhook has the same name; give it another one"));
        }
        let target = Target::Mail(self::mail(mail).map_err(|why| wrong("mail", name, &why))?);
        channels.push(ChannelConfig { name: name.clone(), rules: rules(mail.severity, &mail.exclude), target });
    }
    Ok(NotifyConfig { link: notify.link.clone(), channels })
}

fn wrong(kind: &str, name: &str, why: &str) -> Failure {
    Failure::new(Kind::Usage, format!("[notify.{kind}.{name}] cannot be used: {why}"))
        .hint("virtward notify test --help shows an example")
}

fn webhook(hook: &Webhook) -> Result<WebhookConfig, String> {
    let url = match (&hook.url, &hook.url_file) {
        (Some(url), None) => MaybeSecret::Here(url.clone()),
        (None, Some(file)) => MaybeSecret::File(file.clone()),
        _ => return Err("it needs url, or url-file with the URL in its first line".into()),
    };
    if let MaybeSecret::Here(url) = &url {
        notify::check_url(url)?;
    }
    Ok(WebhookConfig {
        url,
        secret_file: hook.secret_file.clone(),
        token_file: hook.token_file.clone(),
        ca_file: hook.ca_file.clone(),
    })
}

fn mail(mail: &Mail) -> Result<MailConfig, String> {
    if mail.server.is_empty() || mail.to.is_empty() {
        return Err("it needs server, from and to".into());
    }
    for address in mail.to.iter().chain([&mail.from]) {
        notify::check_address(address)?;
    }
    let (tls, port) = match mail.tls.unwrap_or(Tls::Starttls) {
        Tls::Starttls => (MailTls::StartTls, 587),
        Tls::Implicit => (MailTls::Implicit, 465),
        Tls::None => (MailTls::None, 25),
    };
    let login = match (&mail.user, &mail.password_file) {
        (Some(user), Some(file)) => Some((user.clone(), file.clone())),
        (None, None) => None,
        _ => return Err("it names one of user and password-file; name both, or neither".into()),
    };
    if login.is_some() && tls == MailTls::None {
        return Err(
            "tls = \"none\" would send the password readable by everybody on the way; use starttls or implicit".into(),
        );
    }
    Ok(MailConfig {
        server: mail.server.clone(),
        port: mail.port.unwrap_or(port),
        tls,
        ca_file: mail.ca_file.clone(),
        login,
        from: mail.from.clone(),
        to: mail.to.clone(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settled(text: &str) -> Result<NotifyConfig, Failure> {
        settle(&toml::from_str(text).unwrap())
    }

    #[test]
    fn a_channel_takes_what_it_does_not_say_from_the_section() {
        let config = settled(
            "severity = \"error\"\ngroup-wait = \"5s\"\nexclude = [\"leader\"]\n\
             [webhook.ops]\nurl = \"https://h.example/x\"\nseverity = \"info\"\nexclude = [\"node\"]\n\
             [mail.admins]\nserver = \"mx\"\nfrom = \"Virtward <v@example.org>\"\nto = [\"a@example.org\"]\n",
        )
        .unwrap();
        let [ops, admins] = &config.channels[..] else { panic!("{config:?}") };
        assert_eq!((ops.rules.severity, admins.rules.severity), (Level::Info, Level::Error));
        assert_eq!(ops.rules.exclude, ["leader", "node"]);
        assert_eq!(admins.rules.group_wait, Duration::from_secs(5));
        let Target::Mail(mail) = &admins.target else { panic!() };
        assert_eq!((mail.port, mail.tls), (587, MailTls::StartTls), "protected unless said otherwise");
    }

    #[test]
    fn what_cannot_work_is_refused_with_the_section() {
        for (text, says) in [
            ("[webhook.a]\n", "needs url"),
            ("[webhook.a]\nurl = \"ftp://x\"\n", "http"),
            ("[mail.a]\nserver = \"mx\"\nfrom = \"v@e.org\"\n", "needs server"),
            ("[mail.a]\nserver = \"mx\"\nfrom = \"nobody\"\nto = [\"a@e.org\"]\n", "no mail address"),
            ("[mail.a]\nserver = \"mx\"\nfrom = \"v@e.org\"\nto = [\"a@e.org\"]\nuser = \"u\"\n", "name both"),
            (
                "[mail.a]\nserver = \"mx\"\nfrom = \"v@e.org\"\nto = [\"a@e.org\"]\nuser = \"u\"\n\
                 password-file = \"/p\"\ntls = \"none\"\n",
                "readable by everybody",
            ),
            (
                "[webhook.a]\nurl = \"http://x\"\n[mail.a]\nserver = \"mx\"\nfrom = \"v@e.org\"\nto = [\"a@e.org\"]\n",
                "same name",
            ),
        ] {
            let failure = settled(text).unwrap_err();
            assert_eq!(failure.kind, Kind::Usage);
            assert!(failure.message.contains(says) && failure.message.contains(".a]"), "{failure}");
        }
    }
}
