//! Where a bucket is and who asks: the URL, the options, the environment and the files of other tools, in this order.

use std::path::{Path, PathBuf};

use zeroize::Zeroizing;

use super::{
    profile::{self, Profile},
    sign::{Credentials, encode},
};
use crate::error::{Error, Result};

/// Region where none is named: what servers other than AWS mostly accept.
const REGION_DEFAULT: &str = "us-east-1";

/// How S3-compatible object storage is reached. What is not set is looked for in the variables and files that other tools
/// use: `AWS_ENDPOINT_URL_S3`, `AWS_ENDPOINT_URL`, `AWS_REGION`, `AWS_CA_BUNDLE`, `~/.aws/config`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct S3Options {
    /// URL of the server; AWS if there is none.
    pub endpoint: Option<String>,
    /// Region that requests are signed for.
    pub region: Option<String>,
    /// Whether the bucket is part of the path and not of the host name. Default: yes unless at AWS.
    pub path_style: Option<bool>,
    /// Certificates to trust instead of the system's, PEM.
    pub ca_file: Option<PathBuf>,
    /// Retention of what is written.
    pub object_lock: Option<ObjectLock>,
    /// For servers that ignore `If-None-Match`: look first, write, and look again. Not safe against several hosts that
    /// begin an epoch at the same instant, so only one may collect garbage or verify at a time.
    pub emulate_conditions: bool,
}

/// Retention that the server enforces on objects. The bucket must have been made with object lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ObjectLock {
    /// Who may lift it.
    pub mode: LockMode,
    /// Days from writing or renewal during which the object cannot be deleted.
    pub days: u32,
}

/// Mode of object lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LockMode {
    /// Users with a special permission may lift it.
    Governance,
    /// Nobody may lift it.
    Compliance,
}

impl LockMode {
    /// As the protocol spells it.
    pub fn as_str(self) -> &'static str {
        match self {
            LockMode::Governance => "GOVERNANCE",
            LockMode::Compliance => "COMPLIANCE",
        }
    }
}

impl std::str::FromStr for LockMode {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match text.to_ascii_lowercase().as_str() {
            "governance" => Ok(LockMode::Governance),
            "compliance" => Ok(LockMode::Compliance),
            _ => Err(format!("{text:?} is no mode of object lock; give governance or compliance")),
        }
    }
}

/// Everything that a client needs.
#[derive(Clone, Debug)]
pub struct Settings {
    /// `s3://bucket/prefix`, for messages.
    pub location: String,
    /// Bucket.
    pub bucket: String,
    /// In front of every name: empty, or ending in a slash.
    pub prefix: String,
    /// Scheme, host and port, without a slash at the end.
    pub origin: String,
    /// Host and port as the `Host` header says them.
    pub host: String,
    /// In front of every key, percent-encoded: empty, or a slash and the bucket.
    pub base_path: String,
    pub region: String,
    pub credentials: Credentials,
    pub ca_file: Option<PathBuf>,
    pub object_lock: Option<ObjectLock>,
    pub emulate_conditions: bool,
}

/// Answers for environment variables.
pub type Env<'a> = &'a dyn Fn(&str) -> Option<String>;

impl Settings {
    /// Settles everything for `bucket/prefix`, what follows `s3://`.
    pub fn resolve(rest: &str, options: &S3Options, env: Env<'_>) -> Result<Self> {
        let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
        let prefix = prefix.trim_matches('/');
        check_url(bucket, prefix)?;
        let location = if prefix.is_empty() { format!("s3://{bucket}") } else { format!("s3://{bucket}/{prefix}") };
        let env = |name: &str| env(name).filter(|value| !value.is_empty());
        let files = Files::read(&env)?;
        let credentials = credentials(&location, &env, &files)?;
        let endpoint = options
            .endpoint
            .clone()
            .or_else(|| env("AWS_ENDPOINT_URL_S3"))
            .or_else(|| env("AWS_ENDPOINT_URL"))
            .or_else(|| files.get("endpoint_url"));
        let region = options
            .region
            .clone()
            .or_else(|| env("AWS_REGION"))
            .or_else(|| env("AWS_DEFAULT_REGION"))
            .or_else(|| files.get("region"))
            .unwrap_or_else(|| REGION_DEFAULT.into());
        let ca_file = options
            .ca_file
            .clone()
            .or_else(|| env("AWS_CA_BUNDLE").map(PathBuf::from))
            .or_else(|| files.get("ca_bundle").map(PathBuf::from));
        // A dot in the bucket's name does not fit a certificate for one level of names.
        let path_style = options.path_style.unwrap_or(endpoint.is_some() || bucket.contains('.'));
        let endpoint = endpoint.unwrap_or_else(|| format!("https://s3.{region}.amazonaws.com"));
        let (scheme, host) = split_endpoint(&endpoint)?;
        let (host, base_path) = match path_style {
            true => (host, format!("/{}", encode(bucket, false))),
            false => (format!("{bucket}.{host}"), String::new()),
        };
        Ok(Self {
            location,
            bucket: bucket.into(),
            prefix: if prefix.is_empty() { String::new() } else { format!("{prefix}/") },
            origin: format!("{scheme}://{host}"),
            host,
            base_path,
            region,
            credentials,
            ca_file,
            object_lock: options.object_lock,
            emulate_conditions: options.emulate_conditions,
        })
    }

    /// Whether the server is on this machine: never asked through a proxy.
    pub fn is_local(&self) -> bool {
        let host = self.host.rsplit_once(':').map_or(&*self.host, |(host, _)| host);
        host == "localhost" || host == "[::1]" || host.starts_with("127.")
    }
}

fn unsupported(what: String) -> Error {
    Error::Unsupported { what }
}

fn check_url(bucket: &str, prefix: &str) -> Result<()> {
    let is_name = |b: u8| b.is_ascii_alphanumeric() || b"-._".contains(&b);
    if bucket.len() < 3 || bucket.len() > 63 || !bucket.bytes().all(is_name) {
        return Err(unsupported(format!(
            "s3://{bucket}/{prefix}: {bucket:?} is no name of a bucket; write s3://bucket/prefix"
        )));
    }
    let good = |part: &str| !part.is_empty() && part != "." && part != ".." && !part.contains(|c: char| c.is_control());
    if !prefix.is_empty() && (prefix.len() > 512 || !prefix.split('/').all(good)) {
        return Err(unsupported(format!(
            "s3://{bucket}/{prefix}: the prefix has empty parts, dots or control characters; choose a plain one"
        )));
    }
    Ok(())
}

/// Scheme, and host with port if it is not the scheme's own.
fn split_endpoint(endpoint: &str) -> Result<(&'static str, String)> {
    let bad =
        |why: &str| unsupported(format!("the S3 endpoint {endpoint} {why}; write https://host or https://host:port"));
    let (scheme, rest, port) = match endpoint.split_once("://") {
        Some(("https", rest)) => ("https", rest, ":443"),
        Some(("http", rest)) => ("http", rest, ":80"),
        _ => return Err(bad("begins neither with https:// nor with http://")),
    };
    let host = rest.trim_end_matches('/');
    if host.contains('@') {
        // What stands before it may be a secret.
        return Err(unsupported(
            "the S3 endpoint holds a user name; credentials belong into AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
                .into(),
        ));
    }
    let is_host = |b: u8| b.is_ascii_alphanumeric() || b"-._:[]".contains(&b);
    if host.is_empty() || !host.bytes().all(is_host) {
        return Err(bad("is more than a host and a port"));
    }
    Ok((scheme, host.strip_suffix(port).unwrap_or(host).to_ascii_lowercase()))
}

/// The named profile in both files.
struct Files {
    name: String,
    credentials: Option<Profile>,
    config: Option<Profile>,
}

impl Files {
    fn read(env: Env<'_>) -> Result<Self> {
        let name = env("AWS_PROFILE").unwrap_or_else(|| "default".into());
        let home = env("HOME").unwrap_or_else(|| "/root".into());
        let path = |variable: &str, leaf: &str| match env(variable) {
            Some(path) => PathBuf::from(path),
            None => Path::new(&home).join(".aws").join(leaf),
        };
        Ok(Self {
            credentials: profile::read(&path("AWS_SHARED_CREDENTIALS_FILE", "credentials"), &name)?,
            config: profile::read(&path("AWS_CONFIG_FILE", "config"), &name)?,
            name,
        })
    }
    fn get(&self, key: &str) -> Option<String> {
        let both = [&self.credentials, &self.config];
        both.into_iter().flatten().find_map(|profile| profile.get(key)).filter(|v| !v.is_empty()).map(str::to_owned)
    }
}

fn credentials(location: &str, env: Env<'_>, files: &Files) -> Result<Credentials> {
    // A profile that is asked for by name wins over keys that happen to be in the environment.
    let from_env = || match (env("AWS_ACCESS_KEY_ID"), env("AWS_SECRET_ACCESS_KEY")) {
        (Some(id), Some(secret)) => Some((id, secret, env("AWS_SESSION_TOKEN"))),
        _ => None,
    };
    let from_files = || {
        let profile = [&files.credentials, &files.config];
        profile.into_iter().flatten().find_map(|p| {
            let text = |key| p.get(key).map(str::to_owned);
            Some((text("aws_access_key_id")?, text("aws_secret_access_key")?, text("aws_session_token")))
        })
    };
    let found =
        if env("AWS_PROFILE").is_some() { from_files().or_else(from_env) } else { from_env().or_else(from_files) };
    let Some((access_key, secret, token)) = found else {
        return Err(Error::Remote {
            action: "open",
            object: location.into(),
            what: format!(
                "there are no credentials in the environment or in profile {:?} of ~/.aws/credentials",
                files.name
            ),
            hint: "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or name a profile that holds keys with AWS_PROFILE"
                .into(),
            is_denied: true,
        });
    };
    Ok(Credentials {
        access_key,
        secret_key: Zeroizing::new(secret),
        session_token: token.filter(|t| !t.is_empty()).map(Zeroizing::new),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resolve(rest: &str, options: &S3Options, env: &[(&str, &str)]) -> Result<Settings> {
        let env = |name: &str| match name {
            "HOME" => Some("/nonexistent".into()),
            _ => env.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned()),
        };
        Settings::resolve(rest, options, &env)
    }
    const KEYS: [(&str, &str); 2] = [("AWS_ACCESS_KEY_ID", "AK"), ("AWS_SECRET_ACCESS_KEY", "hush")];

    #[test]
    fn aws_is_addressed_by_host_and_others_by_path() {
        let aws = resolve("bucket/a/b/", &S3Options::default(), &KEYS).unwrap();
        assert_eq!(aws.origin, "https://bucket.s3.us-east-1.amazonaws.com");
        assert_eq!((&*aws.base_path, &*aws.prefix, &*aws.location), ("", "a/b/", "s3://bucket/a/b"));
        let own = S3Options { endpoint: Some("http://NAS:9000/".into()), ..S3Options::default() };
        let own = resolve("bucket", &own, &KEYS).unwrap();
        assert_eq!((&*own.origin, &*own.host), ("http://nas:9000", "nas:9000"));
        assert_eq!((&*own.base_path, &*own.prefix, &*own.location), ("/bucket", "", "s3://bucket"));
        let port =
            S3Options { endpoint: Some("https://x:443".into()), path_style: Some(false), ..S3Options::default() };
        assert_eq!(resolve("bucket", &port, &KEYS).unwrap().host, "bucket.x");
    }

    #[test]
    fn options_beat_variables_and_variables_beat_files() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("credentials");
        let text = "[default]\naws_access_key_id = FILE\naws_secret_access_key = f\n[eu]\naws_access_key_id = EU\n\
                    aws_secret_access_key = e\nregion = eu-1\n";
        std::fs::write(&file, text).unwrap();
        let file = [("AWS_SHARED_CREDENTIALS_FILE", file.to_str().unwrap())];
        let none = S3Options::default();
        assert_eq!(resolve("bucket", &none, &file).unwrap().credentials.access_key, "FILE");
        let both = [file[0], KEYS[0], KEYS[1], ("AWS_REGION", "env-1")];
        let settings = resolve("bucket", &none, &both).unwrap();
        assert_eq!((&*settings.credentials.access_key, &*settings.region), ("AK", "env-1"));
        let named = [file[0], KEYS[0], KEYS[1], ("AWS_PROFILE", "eu")];
        let settings = resolve("bucket", &none, &named).unwrap();
        assert_eq!((&*settings.credentials.access_key, &*settings.region), ("EU", "eu-1"));
        let region = S3Options { region: Some("opt-1".into()), ..none };
        assert_eq!(resolve("bucket", &region, &both).unwrap().region, "opt-1");
    }

    #[test]
    fn what_is_wrong_is_said_without_secrets() {
        let endpoint = |url: &str| S3Options { endpoint: Some(url.into()), ..S3Options::default() };
        for (rest, options, says) in [
            ("", S3Options::default(), "name of a bucket"),
            ("bucket/a//b", S3Options::default(), "empty parts"),
            ("bucket/../b", S3Options::default(), "dots"),
            ("bucket", endpoint("ftp://x"), "neither"),
            ("bucket", endpoint("https://x/y"), "host and a port"),
            ("bucket", endpoint("https://me:hush@x"), "user name"),
        ] {
            let error = resolve(rest, &options, &KEYS).unwrap_err().to_string();
            assert!(error.contains(says) && !error.contains("hush"), "{error}");
        }
        let error = resolve("bucket", &S3Options::default(), &[]).unwrap_err();
        assert!(matches!(error, Error::Remote { is_denied: true, .. }), "{error}");
        let shown = format!("{:?}", resolve("bucket", &S3Options::default(), &KEYS).unwrap());
        assert!(!shown.contains("hush"), "{shown}");
    }
}
