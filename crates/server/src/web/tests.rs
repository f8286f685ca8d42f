//! What a build must not break in the interface: its parts are all there and in both languages, no text stands in the
//! code, no data becomes markup, and nothing comes from elsewhere.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
};

use serde_json::Value;

use super::*;

type Words = BTreeMap<String, String>;

fn words(language: &str) -> Words {
    let name = format!("lang/{language}.json");
    let (_, text) = ASSETS.iter().find(|(known, _)| *known == name).unwrap();
    serde_json::from_str(text).unwrap()
}

fn scripts() -> impl Iterator<Item = (&'static str, &'static str)> {
    ASSETS.iter().copied().filter(|(name, _)| name.ends_with(".js"))
}

/// A literal of a script: where it is, what stands before it on its line, and what it says; `${…}` becomes `\0`.
struct Literal {
    line: usize,
    before: String,
    text: String,
}

/// Every string and template of a script, comments left out. Regular expressions with quotes in them would confuse it;
/// there are none.
fn literals(script: &str) -> Vec<Literal> {
    let mut found = Vec::new();
    let mut rest = script.char_indices().peekable();
    let (mut line, mut line_start) = (1, 0);
    while let Some((at, c)) = rest.next() {
        match c {
            '\n' => (line, line_start) = (line + 1, at + 1),
            '/' if script[at..].starts_with("//") => while rest.next_if(|(_, c)| *c != '\n').is_some() {},
            '/' if script[at..].starts_with("/*") => {
                let end = at + script[at..].find("*/").expect("an ended comment");
                line += script[at..end].matches('\n').count();
                while rest.next_if(|(i, _)| *i < end + 2).is_some() {}
            }
            '\'' | '"' | '`' => {
                let (mut text, first) = (String::new(), line);
                while let Some((i, inner)) = rest.next() {
                    match inner {
                        '\\' => text.extend(rest.next().map(|(_, escaped)| if escaped == 'u' { ' ' } else { escaped })),
                        '$' if c == '`' && script[i..].starts_with("${") => {
                            let mut depth = 0;
                            for (_, inner) in rest.by_ref() {
                                depth += i32::from(inner == '{') - i32::from(inner == '}');
                                if depth == 0 {
                                    break;
                                }
                            }
                            text.push('\0');
                        }
                        end if end == c => break,
                        other => {
                            line += usize::from(other == '\n');
                            text.push(other);
                        }
                    }
                }
                found.push(Literal { line: first, before: script[line_start..at].to_owned(), text });
            }
            _ => {}
        }
    }
    found
}

#[test]
fn every_file_is_embedded() {
    fn walk(dir: &Path, base: &Path, found: &mut BTreeSet<String>) {
        for entry in fs::read_dir(dir).unwrap().map(Result::unwrap) {
            match entry.file_type().unwrap().is_dir() {
                true => walk(&entry.path(), base, found),
                false => drop(found.insert(entry.path().strip_prefix(base).unwrap().to_str().unwrap().to_owned())),
            }
        }
    }
    let base = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/web/assets");
    let mut files = BTreeSet::new();
    walk(&base, &base, &mut files);
    let known = ASSETS.iter().map(|(name, _)| (*name).to_owned()).chain(["index.html".to_owned()]).collect();
    assert_eq!(files, known);
}

#[test]
fn browser_and_server_know_the_same_pages() {
    let (_, router) = ASSETS.iter().find(|(name, _)| *name == "router.js").unwrap();
    let mut in_browser = BTreeSet::new();
    for literal in literals(router).into_iter().filter(|literal| literal.before.trim() == "[") {
        let parts = literal.text.split('/').map(|part| match part.strip_prefix(':') {
            Some(name) => format!("{{{name}}}"),
            None => part.to_owned(),
        });
        in_browser.insert(parts.collect::<Vec<_>>().join("/"));
    }
    assert_eq!(in_browser, PAGES.iter().map(|page| (*page).to_owned()).collect());
}

#[test]
fn both_languages_say_the_same_things() {
    let (english, chinese) = (words("en"), words("zh-TW"));
    assert_eq!(english.keys().collect::<Vec<_>>(), chinese.keys().collect::<Vec<_>>());
    let holes = |text: &str| -> BTreeSet<String> {
        let each = text.split('{').skip(1).filter_map(|rest| rest.split('}').next());
        // What chooses by number may be without need in a language that does not count so.
        each.filter(|hole| !hole.contains('|')).map(str::to_owned).collect()
    };
    for (key, text) in &english {
        let other = &chinese[key];
        assert!(!text.trim().is_empty() && !other.trim().is_empty(), "{key} is empty");
        let (here, there) = (holes(text), holes(other));
        assert!(here.is_subset(&there), "{key}: {text:?} has {here:?}, {other:?} has {there:?}");
    }
}

#[test]
fn the_other_language_is_not_english() {
    // Names and units, the same everywhere.
    let same = ["restore.suggested", "settings.api", "settings.connect", "vm.vcpus"];
    for (key, text) in words("zh-TW") {
        let mut bare = text.clone();
        while let (Some(from), Some(to)) = (bare.find('{'), bare.find('}')) {
            bare.replace_range(from..=to, "");
        }
        let is_foreign = bare.chars().any(|c| c.is_ascii_alphabetic()) && bare.is_ascii();
        assert!(!is_foreign || same.contains(&&*key), "{key} is not translated: {text}");
    }
}

#[test]
fn every_text_that_is_asked_for_exists_and_none_is_idle() {
    let known = words("en");
    let mut used = BTreeSet::new();
    for (name, script) in scripts() {
        for literal in literals(script) {
            let asked = ["t(", "word("].iter().any(|call| {
                let before = literal.before.trim_end().strip_suffix(call);
                before.is_some_and(|before| !before.ends_with(|c: char| c.is_alphanumeric() || c == '_'))
            });
            if asked && !literal.text.contains('\0') {
                assert!(
                    known.contains_key(&literal.text),
                    "{name}:{}: there is no text {}",
                    literal.line,
                    literal.text
                );
            }
            match literal.text.split_once('\0') {
                // The kinds of states, all of which `every_state_of_the_api_has_a_word` knows.
                Some(("", _)) if asked => {
                    let kinds = [
                        "ha-grade.",
                        "ha-phase.",
                        "ha-vm.",
                        "host.",
                        "job.",
                        "operation.",
                        "power.",
                        "protection.",
                        "repository.",
                        "severity.",
                    ];
                    used.extend(known.keys().filter(|key| kinds.iter().any(|kind| key.starts_with(kind))).cloned());
                }
                Some((start, end)) if asked => {
                    let fits = |key: &&String| key.starts_with(start) && key.ends_with(end.trim_end_matches('\0'));
                    let all: Vec<_> = known.keys().filter(fits).cloned().collect();
                    assert!(!all.is_empty(), "{name}:{}: no text begins with {start}", literal.line);
                    used.extend(all);
                }
                _ => drop(used.insert(literal.text)),
            }
        }
    }
    let idle: Vec<_> = known.keys().filter(|key| !used.contains(*key)).collect();
    assert!(idle.is_empty(), "nothing says these: {idle:?}");
}

#[test]
fn every_state_of_the_api_has_a_word() {
    let document: Value = serde_json::from_str(virtward_api::openapi::DOCUMENT).unwrap();
    let known = words("en");
    for (schema, prefix) in [
        ("Code", "problem"),
        ("FindingSeverity", "severity"),
        ("HostState", "host"),
        ("JobKind", "kind"),
        ("JobState", "job"),
        ("LogLevel", "severity"),
        ("PowerState", "power"),
        ("PrincipalKind", "via"),
        ("ProtectionState", "protection"),
        ("Quiesce", "quiesce"),
        ("RepositoryState", "repository"),
        ("Role", "role"),
        ("Saying", "said"),
        ("Severity", "severity"),
        ("VerifyDepth", "verify"),
    ] {
        let states = values(&document["components"]["schemas"][schema]);
        assert!(!states.is_empty(), "the document has no {schema}");
        for state in states {
            let key = format!("{prefix}.{state}");
            assert!(known.contains_key(&key), "there is no text {key} for {schema}");
        }
    }
}

/// The values of an enumeration, however it is written.
fn values(schema: &Value) -> Vec<String> {
    let own = schema["enum"].as_array().into_iter().flatten().chain(schema.get("const"));
    let mut found: Vec<String> = own.filter_map(Value::as_str).map(str::to_owned).collect();
    for one in schema["oneOf"].as_array().into_iter().flatten() {
        found.extend(values(one));
    }
    found
}

#[test]
fn no_text_for_people_stands_in_the_code() {
    // Names, a command, units, keys, methods: the same in every language.
    let same = [
        "Virtward",
        "English",
        "繁體中文",
        "JSON",
        "TOML",
        "OpenAPI 3.1",
        "UUID",
        "QEMU",
        "libvirt",
        "KiB",
        "Escape",
        "Tab",
        "virtward token create me --role operator",
        "virtward cluster join",
        "virtward ha enable",
        "GET",
        "POST",
        "PUT",
        "DELETE",
    ];
    // What stands behind these is for the browser.
    let technical = [
        "class:",
        "style:",
        " d:",
        "viewBox:",
        "kind:",
        "kind =",
        "'aria-describedby':",
        "rel:",
        "querySelector(",
        "querySelectorAll(",
        "closest?.(",
        "TEMPLATE =",
    ];
    let mut found = Vec::new();
    for (name, script) in scripts().filter(|(name, _)| *name != "icons.js") {
        for literal in literals(script) {
            let text = literal.text.replace('\0', "");
            let words = || text.split(|c: char| !c.is_alphabetic()).filter(|word| word.chars().count() > 1);
            let is_capital =
                |word: &str| word.starts_with(char::is_uppercase) && word.chars().skip(1).all(char::is_lowercase);
            let is_sentence = text.trim().contains(' ') && words().count() > 1;
            let is_foreign = text.chars().any(|c| !c.is_ascii() && c.is_alphabetic());
            let is_known = technical.iter().any(|word| literal.before.contains(word))
                || same.iter().any(|known| text.contains(known));
            if (is_sentence || is_foreign || words().any(is_capital)) && !is_known {
                found.push(format!("{name}:{}: {:?}", literal.line, literal.text));
            }
        }
    }
    assert!(found.is_empty(), "these belong in the dictionaries: {found:#?}");
    // The test itself must see what it is there for.
    let script = "h('b', null, 'Save it'); h('i', { class: 'Not text' }); // 'Nor this'";
    let seen: Vec<String> = literals(script).into_iter().map(|literal| literal.text).collect();
    assert_eq!(seen, ["b", "Save it", "i", "Not text"]);
}

#[test]
fn data_never_becomes_markup_and_nothing_comes_from_elsewhere() {
    let banned = [
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "new Function",
        "DOMParser",
        "createContextualFragment",
        "srcdoc",
        "javascript:",
    ];
    for (name, text) in ASSETS.iter().chain([&("index.html", INDEX)]) {
        for word in banned {
            assert!(!text.contains(word), "{name} has {word}");
        }
        let outside = text.replace("http://www.w3.org/2000/svg", "");
        assert!(!outside.contains("http://") && !outside.contains("https://") && !outside.contains("url(//"), "{name}");
        // What the policy of the pages forbids would only fail in a browser.
        assert!(!text.contains("style=\"") && !text.contains(" onclick=\"") && !text.contains("setAttribute('style'"));
    }
    assert!(!INDEX.contains("<style") && !INDEX.contains("<script>"));
}

#[test]
fn modules_import_what_exists() {
    for (name, script) in scripts() {
        for literal in literals(script).into_iter().filter(|literal| literal.before.trim_end().ends_with(" from")) {
            let mut at: Vec<&str> = name.split('/').collect();
            at.pop();
            for part in literal.text.split('/') {
                match part {
                    "." => {}
                    ".." => drop(at.pop()),
                    part => at.push(part),
                }
            }
            let wanted = at.join("/");
            assert!(ASSETS.iter().any(|(known, _)| *known == wanted), "{name} imports {wanted}");
        }
    }
}

#[test]
fn files_stay_small() {
    for (name, text) in ASSETS.iter().filter(|(name, _)| !name.starts_with("lang/")) {
        assert!(text.lines().count() <= 320, "{name} has {} lines", text.lines().count());
    }
    let all: usize = ASSETS.iter().map(|(_, text)| text.len()).sum();
    assert!(all < 300 << 10, "{all} bytes have to be loaded");
}
