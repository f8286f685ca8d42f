//! The web interface: pages and their assets, embedded in the binary.
//!
//! Everything that a page needs is served from here; nothing is fetched from anywhere else, and there is no build step:
//! browsers run the modules as they are written. All assets are under one path that has their common hash in it, so that
//! they are cached for good, modules find each other by relative paths, and no page ever mixes two versions. Which page
//! an address shows is decided in the browser (`assets/router.js`); the server only has to know which addresses are
//! pages. Everything here may be read by anybody: what needs a log-in comes from the API.

mod reference;

use std::{collections::BTreeMap, sync::LazyLock};

use axum::{
    Router,
    extract::Path,
    http::{HeaderMap, HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};
use virtward_api::Said;

/// Addresses that show a page; `assets/router.js` has the same.
const PAGES: [&str; 18] = [
    "/",
    "/vms",
    "/vms/{vm}",
    "/vms/{vm}/restore",
    "/hosts",
    "/hosts/{host}",
    "/cluster",
    "/ha",
    "/balance",
    "/jobs",
    "/jobs/{job}",
    "/policies",
    "/policies/{policy}",
    "/repositories",
    "/repositories/{repository}",
    "/events",
    "/audit",
    "/settings",
];

/// The texts of the pages, by language.
const LANGUAGES: [&str; 2] = ["en", "zh-TW"];
static WORDS: LazyLock<Vec<BTreeMap<String, String>>> = LazyLock::new(|| {
    let file = |language: &&str| ASSETS.iter().find(|(name, _)| *name == format!("lang/{language}.json"));
    LANGUAGES.iter().filter_map(file).filter_map(|(_, text)| serde_json::from_str(text).ok()).collect()
});

/// Why a sentence cannot be said in every language, if it cannot: a text or a value is missing.
pub fn cannot_say(said: &Said) -> Option<String> {
    let key = format!("said.{}", said.key);
    let mut inner = said.values.values().filter_map(|value| serde_json::from_value(value.clone()).ok());
    if let Some(missing) = inner.find_map(|inner: Said| cannot_say(&inner)) {
        return Some(missing);
    }
    for words in WORDS.iter() {
        let Some(text) = words.get(&key) else { return Some(format!("no text {key}")) };
        let holes = text.split('{').skip(1).filter_map(|rest| rest.split(['}', '|']).next());
        if let Some(hole) = holes.into_iter().find(|hole| !said.values.contains_key(*hole)) {
            return Some(format!("{key} without {hole}"));
        }
    }
    None
}

/// Embeds files under their names.
macro_rules! assets {
    ($($name:literal),* $(,)?) => {
        &[$(($name, include_str!(concat!("assets/", $name)))),*]
    };
}

const INDEX: &str = include_str!("assets/index.html");
const ASSETS: &[(&str, &str)] = assets![
    "api.js",
    "base.css",
    "chart.js",
    "dom.js",
    "format.js",
    "i18n.js",
    "icon.svg",
    "icons.js",
    "lang/en.json",
    "lang/zh-TW.json",
    "main.js",
    "pages/audit.js",
    "pages/balance.js",
    "pages/cluster.js",
    "pages/events.js",
    "pages/ha.js",
    "pages/host.js",
    "pages/hosts.js",
    "pages/job.js",
    "pages/jobs.js",
    "pages/login.js",
    "pages/moves.js",
    "pages/overview.js",
    "pages/policies.js",
    "pages/policy.js",
    "pages/repositories.js",
    "pages/repository.js",
    "pages/restore.js",
    "pages/settings.js",
    "pages/shared.js",
    "pages/vm.js",
    "pages/vms.js",
    "parts.css",
    "reference.css",
    "router.js",
    "shell.js",
    "stream.js",
    "theme.js",
    "ui.js",
];

/// The page that all addresses share, with the hash of the assets in its links.
struct Shell {
    hash: String,
    html: String,
    etag: HeaderValue,
}

static SHELL: LazyLock<Shell> = LazyLock::new(|| {
    let mut hasher = blake3::Hasher::new();
    for (name, text) in ASSETS.iter().chain([&("index.html", INDEX)]) {
        for part in [name.as_bytes(), text.as_bytes()] {
            hasher.update(&(part.len() as u64).to_le_bytes());
            hasher.update(part);
        }
    }
    let hash = hasher.finalize().to_hex()[..16].to_owned();
    let html = INDEX.replace("HASH", &hash);
    let etag = HeaderValue::try_from(format!("\"{hash}\"")).unwrap_or(HeaderValue::from_static("\"0\""));
    Shell { hash, html, etag }
});

/// Routes of the pages and their assets, for any state.
pub fn routes<S: Clone + Send + Sync + 'static>() -> Router<S> {
    let pages = PAGES.iter().fold(Router::new(), |router, path| router.route(path, get(page)));
    pages.route("/api", get(reference)).route("/assets/{hash}/{*name}", get(asset))
}

async fn page(headers: HeaderMap) -> Response {
    // The address stays while versions change: it is asked for every time, and answered briefly if it is the same.
    let caching = [(header::CACHE_CONTROL, HeaderValue::from_static("no-cache")), (header::ETAG, SHELL.etag.clone())];
    match headers.get(header::IF_NONE_MATCH) == Some(&SHELL.etag) {
        true => (StatusCode::NOT_MODIFIED, caching).into_response(),
        false => (caching, [(header::CONTENT_TYPE, "text/html; charset=utf-8")], SHELL.html.as_str()).into_response(),
    }
}

/// The API, for people.
async fn reference(headers: HeaderMap) -> Response {
    static PAGE: LazyLock<(String, HeaderValue)> = LazyLock::new(|| {
        let html = reference::PAGE.replace("HASH", &SHELL.hash);
        let hash = blake3::hash(html.as_bytes()).to_hex();
        let etag = HeaderValue::try_from(format!("\"{}\"", &hash[..16])).unwrap_or(HeaderValue::from_static("\"0\""));
        (html, etag)
    });
    let (html, etag) = &*PAGE;
    let caching = [(header::CACHE_CONTROL, HeaderValue::from_static("no-cache")), (header::ETAG, etag.clone())];
    match headers.get(header::IF_NONE_MATCH) == Some(etag) {
        true => (StatusCode::NOT_MODIFIED, caching).into_response(),
        false => (caching, [(header::CONTENT_TYPE, "text/html; charset=utf-8")], html.as_str()).into_response(),
    }
}

async fn asset(Path((hash, name)): Path<(String, String)>) -> Response {
    let found = ASSETS.iter().find(|(known, _)| *known == name);
    // A page of another version must load itself again, not the parts of this one.
    let Some((_, text)) = found.filter(|_| hash == SHELL.hash) else {
        return (StatusCode::NOT_FOUND, "there is no such asset; load the page again\n").into_response();
    };
    let kind = media_type(&name);
    ([(header::CONTENT_TYPE, kind), (header::CACHE_CONTROL, "public, max-age=31536000, immutable")], *text)
        .into_response()
}

fn media_type(name: &str) -> &'static str {
    match name.rsplit('.').next() {
        Some("js") => "text/javascript; charset=utf-8",
        Some("css") => "text/css; charset=utf-8",
        Some("json") => "application/json",
        Some("svg") => "image/svg+xml",
        _ => "application/octet-stream",
    }
}

#[cfg(test)]
mod tests;
