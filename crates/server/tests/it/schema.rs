//! Whether a value is what a schema says: as much of JSON Schema as the document of the API uses.

use serde_json::Value;

/// What is wrong with a value, with the place of each; nothing if it fits.
pub fn misfits(value: &Value, schema: &Value, document: &Value) -> Vec<String> {
    let mut found = Vec::new();
    look(value, schema, document, "$", &mut found);
    found
}

fn is_a(value: &Value, kind: &str) -> bool {
    match kind {
        "null" => value.is_null(),
        "boolean" => value.is_boolean(),
        "string" => value.is_string(),
        "integer" => value.is_i64() || value.is_u64(),
        "number" => value.is_number(),
        "array" => value.is_array(),
        "object" => value.is_object(),
        _ => false,
    }
}

fn look(value: &Value, schema: &Value, document: &Value, at: &str, found: &mut Vec<String>) {
    if let Some(reference) = schema["$ref"].as_str() {
        let target = document.pointer(reference.trim_start_matches('#'));
        return match target {
            Some(target) => look(value, target, document, at, found),
            None => found.push(format!("{at}: {reference} leads nowhere")),
        };
    }
    for part in schema["allOf"].as_array().into_iter().flatten() {
        look(value, part, document, at, found);
    }
    if let Some(options) = schema["oneOf"].as_array().or_else(|| schema["anyOf"].as_array()) {
        let tries: Vec<Vec<String>> = options.iter().map(|option| misfits(value, option, document)).collect();
        if tries.iter().all(|misfits| !misfits.is_empty()) {
            found.push(format!("{at}: fits none of the options: {tries:?}"));
        }
    }
    let kinds: Vec<&str> = match &schema["type"] {
        Value::String(kind) => vec![kind],
        Value::Array(kinds) => kinds.iter().filter_map(Value::as_str).collect(),
        _ => Vec::new(),
    };
    if !kinds.is_empty() && !kinds.iter().any(|kind| is_a(value, kind)) {
        return found.push(format!("{at}: {value} is no {}", kinds.join(" or ")));
    }
    if let Some(words) = schema["enum"].as_array()
        && !words.contains(value)
    {
        found.push(format!("{at}: {value} is none of {words:?}"));
    }
    if let (Some(least), Some(number)) = (schema["minimum"].as_f64(), value.as_f64())
        && number < least
    {
        found.push(format!("{at}: {number} is less than {least}"));
    }
    match value {
        Value::Object(fields) => {
            for name in schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str) {
                if !fields.contains_key(name) {
                    found.push(format!("{at}: {name} is missing"));
                }
            }
            for (name, inner) in fields {
                let at = format!("{at}.{name}");
                match (schema["properties"].get(name), &schema["additionalProperties"]) {
                    (Some(known), _) => look(inner, known, document, &at, found),
                    (None, Value::Bool(false)) => found.push(format!("{at}: is not in the schema")),
                    (None, more @ Value::Object(_)) => look(inner, more, document, &at, found),
                    (None, _) => {}
                }
            }
        }
        Value::Array(items) => {
            for (number, item) in items.iter().enumerate() {
                look(item, &schema["items"], document, &format!("{at}[{number}]"), found);
            }
        }
        _ => {}
    }
}
