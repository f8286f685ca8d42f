//! The page of the API: `openapi.json` for people, made once from the document that the daemon itself serves.
//!
//! Plain HTML without a script: it works in every browser, can be searched with the browser's own search, and needs nothing
//! from anywhere else. The names that links lead to are inside of what is folded, so that following one unfolds it.
//! Everything that comes from the document is escaped.

use std::{fmt::Write, sync::LazyLock};

use serde_json::{Map, Value};
use virtward_api::openapi::DOCUMENT;

/// The page, without the hash of the assets in its links.
pub static PAGE: LazyLock<String> =
    LazyLock::new(|| serde_json::from_str(DOCUMENT).map_or_else(|_| String::new(), |document| render(&document)));

const METHODS: [&str; 4] = ["get", "post", "put", "delete"];

fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for letter in text.chars() {
        match letter {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            other => out.push(other),
        }
    }
    out
}

/// Escaped, with what stands between backticks as code.
fn prose(text: &str) -> String {
    let mut out = String::new();
    for (number, part) in text.split('`').enumerate() {
        match number % 2 {
            0 => out.push_str(&escape(part)),
            _ => _ = write!(out, "<code>{}</code>", escape(part)),
        }
    }
    out
}

fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value[key].as_str().unwrap_or_default()
}

fn list<'a>(value: &'a Value, key: &str) -> impl Iterator<Item = &'a Value> {
    value[key].as_array().into_iter().flatten()
}

/// An operation with where it is.
struct Operation<'a> {
    path: &'a str,
    method: &'a str,
    value: &'a Value,
}

fn operations(document: &Value) -> Vec<(&str, Vec<Operation<'_>>)> {
    let mut groups: Vec<(&str, Vec<Operation<'_>>)> =
        list(document, "tags").map(|tag| (text(tag, "name"), Vec::new())).collect();
    let paths = document["paths"].as_object().into_iter().flatten();
    for (path, methods) in paths {
        for method in METHODS {
            let Some(value) = methods.get(method) else { continue };
            let tag = value["tags"][0].as_str().unwrap_or("other");
            let operation = Operation { path, method, value };
            match groups.iter_mut().find(|(known, _)| *known == tag) {
                Some((_, all)) => all.push(operation),
                None => groups.push((tag, vec![operation])),
            }
        }
    }
    groups.retain(|(_, all)| !all.is_empty());
    groups
}

fn render(document: &Value) -> String {
    let info = &document["info"];
    let groups = operations(document);
    let mut page = String::with_capacity(256 << 10);
    page.push_str(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta name=\"color-scheme\" content=\"light dark\">\n<title>Virtward API</title>\n\
         <link rel=\"icon\" href=\"/assets/HASH/icon.svg\" type=\"image/svg+xml\">\n\
         <link rel=\"stylesheet\" href=\"/assets/HASH/base.css\">\n\
         <link rel=\"stylesheet\" href=\"/assets/HASH/reference.css\">\n</head>\n<body>\n\
         <a class=\"skip\" href=\"#operations\">To the operations</a>\n<div class=\"reference\">\n",
    );
    let _ = writeln!(
        page,
        "<header><h1>Virtward API <small>version {}</small></h1>\n<p>{}</p>\n<p>The same for programs: \
         <a href=\"/api/v1/openapi.json\">openapi.json</a>. Programs send a token (<code>Authorization: Bearer vwt_…</code>, \
         made by <code>virtward token create</code>); root of the host uses the Unix socket. To the \
         <a href=\"/\">web interface</a>.</p></header>",
        escape(text(info, "version")),
        prose(text(info, "description")),
    );
    page.push_str("<nav aria-label=\"Operations\"><ul>\n");
    for (tag, all) in &groups {
        let _ = write!(page, "<li><a href=\"#{0}\">{0}</a> <small>{1}</small></li>", escape(tag), all.len());
    }
    page.push_str("<li><a href=\"#schemas\">schemas</a></li></ul></nav>\n<main id=\"operations\">\n");
    for (tag, all) in &groups {
        let about =
            list(document, "tags").find(|one| text(one, "name") == *tag).map_or("", |one| text(one, "description"));
        let _ = writeln!(page, "<section id=\"{0}\"><h2>{0}</h2>\n<p>{1}</p>", escape(tag), prose(about));
        all.iter().for_each(|operation| one(&mut page, operation));
        page.push_str("</section>\n");
    }
    page.push_str("<section id=\"schemas\"><h2>schemas</h2>\n");
    let schemas = document["components"]["schemas"].as_object().into_iter().flatten();
    schemas.for_each(|(name, schema)| described(&mut page, name, schema));
    page.push_str("</section>\n</main>\n</div>\n</body>\n</html>\n");
    page
}

fn one(page: &mut String, operation: &Operation<'_>) {
    let value = operation.value;
    let _ = writeln!(
        page,
        "<details class=\"operation\"><summary><b class=\"method {}\">{}</b> <code>{}</code> <span>{}</span></summary>\
         <div id=\"{}\">",
        operation.method,
        operation.method.to_uppercase(),
        escape(operation.path),
        prose(text(value, "summary")),
        escape(text(value, "operationId")),
    );
    if !text(value, "description").is_empty() {
        let _ = writeln!(page, "<p>{}</p>", prose(text(value, "description")));
    }
    let rows: Vec<String> = list(value, "parameters")
        .map(|parameter| {
            format!(
                "<tr><td><code>{}</code></td><td>{}</td><td>{}</td><td>{}</td></tr>",
                escape(text(parameter, "name")),
                escape(text(parameter, "in")),
                kind(&parameter["schema"]),
                prose(text(parameter, "description")),
            )
        })
        .collect();
    if !rows.is_empty() {
        let _ = writeln!(
            page,
            "<h3>Parameters</h3><div class=\"wide\"><table><thead><tr><th scope=\"col\">Name</th><th scope=\"col\">In</th>\
             <th scope=\"col\">Type</th><th scope=\"col\">Meaning</th></tr></thead><tbody>{}</tbody></table></div>",
            rows.concat()
        );
    }
    if let Some(content) = value["requestBody"]["content"].as_object() {
        let _ = writeln!(page, "<h3>Sent</h3><p>{}</p>", contents(content));
    }
    page.push_str("<h3>Answered</h3><ul>");
    for (status, answer) in value["responses"].as_object().into_iter().flatten() {
        let what = match answer["content"].as_object() {
            Some(content) => contents(content),
            None if status == "default" => "a <a href=\"#schema-Problem\">Problem</a>".to_owned(),
            None => "nothing".to_owned(),
        };
        let status = if status == "default" { "any error" } else { status };
        let _ = write!(page, "<li><code>{}</code> {what}</li>", escape(status));
    }
    page.push_str("</ul></div></details>\n");
}

fn contents(content: &Map<String, Value>) -> String {
    let each = content.iter().map(|(media, of)| match media.as_str() {
        "application/json" => kind(&of["schema"]),
        media => format!("{} (<code>{}</code>)", kind(&of["schema"]), escape(media)),
    });
    each.collect::<Vec<_>>().join(" or ")
}

/// The type of a schema, in words.
fn kind(schema: &Value) -> String {
    if let Some(name) = schema["$ref"].as_str().and_then(|reference| reference.rsplit('/').next()) {
        return format!("<a href=\"#schema-{0}\">{0}</a>", escape(name));
    }
    if let Some(each) = schema["oneOf"].as_array().or(schema["anyOf"].as_array()).or(schema["allOf"].as_array()) {
        return each.iter().map(kind).collect::<Vec<_>>().join(" or ");
    }
    if let Some(values) = schema["enum"].as_array() {
        let values = values.iter().map(|value| format!("<code>{}</code>", escape(&value.to_string())));
        return values.collect::<Vec<_>>().join(", ");
    }
    let named = |name: &str| match name {
        "array" => format!("list of {}", kind(&schema["items"])),
        "object" if schema["properties"].is_object() => {
            let fields = schema["properties"].as_object().into_iter().flatten();
            let fields = fields.map(|(name, of)| format!("<code>{}</code>: {}", escape(name), kind(of)));
            format!("object of {}", fields.collect::<Vec<_>>().join("; "))
        }
        "object" if schema["additionalProperties"].is_object() => {
            format!("map of {}", kind(&schema["additionalProperties"]))
        }
        name => match schema["format"].as_str() {
            Some(format) => format!("{} <small>{}</small>", escape(name), escape(format)),
            None => escape(name),
        },
    };
    match &schema["type"] {
        Value::String(name) => named(name),
        Value::Array(names) => names.iter().filter_map(Value::as_str).map(named).collect::<Vec<_>>().join(" or "),
        _ => "anything".to_owned(),
    }
}

/// A schema with its fields.
fn described(page: &mut String, name: &str, schema: &Value) {
    let _ = writeln!(
        page,
        "<details class=\"operation\"><summary><code>{0}</code> <span>{1}</span></summary><div id=\"schema-{0}\">",
        escape(name),
        prose(text(schema, "description").lines().next().unwrap_or_default()),
    );
    let mut rows = String::new();
    fields(&mut rows, schema);
    match rows.is_empty() {
        true => _ = writeln!(page, "<p>{}</p>", kind(schema)),
        false => {
            let _ = writeln!(
                page,
                "<div class=\"wide\"><table><thead><tr><th scope=\"col\">Field</th><th scope=\"col\">Type</th>\
                 <th scope=\"col\">Meaning</th></tr></thead><tbody>{rows}</tbody></table></div>"
            );
        }
    }
    page.push_str("</div></details>\n");
}

/// Rows of all fields; those of what a schema is made of come with it.
fn fields(rows: &mut String, schema: &Value) {
    for part in list(schema, "allOf") {
        match part["$ref"].as_str() {
            Some(_) => _ = write!(rows, "<tr><td colspan=\"3\">everything of {}</td></tr>", kind(part)),
            None => fields(rows, part),
        }
    }
    let required: Vec<&str> = list(schema, "required").filter_map(Value::as_str).collect();
    for (field, of) in schema["properties"].as_object().into_iter().flatten() {
        let must = if required.contains(&field.as_str()) { "" } else { " <small>optional</small>" };
        let described = list(of, "oneOf").find_map(|part| part["description"].as_str());
        let meaning = of["description"].as_str().or(described).unwrap_or_default();
        let _ = write!(
            rows,
            "<tr><td><code>{}</code>{must}</td><td>{}</td><td>{}</td></tr>",
            escape(field),
            kind(of),
            prose(meaning)
        );
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_operation_and_schema_is_on_the_page_and_every_link_leads_somewhere() {
        let document: Value = serde_json::from_str(DOCUMENT).unwrap();
        let page = &*PAGE;
        let ids: BTreeSet<&str> = page.split(" id=\"").skip(1).filter_map(|rest| rest.split('"').next()).collect();
        let mut seen = 0;
        for (_, methods) in document["paths"].as_object().unwrap() {
            for (_, operation) in methods.as_object().unwrap() {
                assert!(ids.contains(operation["operationId"].as_str().unwrap()), "{operation}");
                seen += 1;
            }
        }
        assert_eq!(seen, virtward_api::routes::ROUTES.len());
        for name in document["components"]["schemas"].as_object().unwrap().keys() {
            assert!(ids.contains(&*format!("schema-{name}")), "{name}");
        }
        for link in page.split("href=\"#").skip(1).filter_map(|rest| rest.split('"').next()) {
            assert!(ids.contains(link), "#{link} leads nowhere");
        }
    }

    #[test]
    fn nothing_becomes_markup_and_nothing_comes_from_elsewhere() {
        assert_eq!(prose("a <b> `c<d>` & \"e\""), "a &lt;b&gt; <code>c&lt;d&gt;</code> &amp; &quot;e&quot;");
        // Addresses of what is watched are named, as text within code elements, and nowhere else.
        let outside: String =
            PAGE.split("<code>").map(|part| part.split_once("</code>").map_or(part, |(_, rest)| rest)).collect();
        for (place, forbidden) in [
            (&*PAGE, ["<script", " style=", "javascript:", "\"http://", "\"https://"].as_slice()),
            (&outside, ["http://", "https://"].as_slice()),
        ] {
            for forbidden in forbidden {
                assert!(!place.contains(forbidden), "{forbidden}");
            }
        }
        // Each element that is opened is closed, in order.
        let mut open: Vec<&str> = Vec::new();
        for tag in PAGE.split('<').skip(1).map(|rest| rest.split('>').next().unwrap()) {
            let name = tag.split_whitespace().next().unwrap();
            match name.strip_prefix('/') {
                Some(name) => assert_eq!(open.pop(), Some(name)),
                None if ["!doctype", "meta", "link"].contains(&name) => {}
                None => open.push(name),
            }
        }
        assert!(open.is_empty(), "{open:?}");
    }
}
