//! The OpenAPI 3.1 document, made from the routes and the types. `openapi.json` beside this crate is what it comes to,
//! checked in so that a change of the API is seen in review; a test keeps the two equal.

use serde_json::{Map, Value, json};
use utoipa::{
    PartialSchema, ToSchema,
    openapi::{RefOr, Schema},
};

use crate::{
    BASE, CSRF_TOKEN, Code, IDEMPOTENCY_KEY, PROBLEM_JSON, Problem, SESSION_COOKIE, StreamReset,
    routes::{Access, Body, HEADINGS, Method, Param, ROUTES, Route},
};

/// The schema of a type, put off until the document is made.
#[derive(Clone, Copy)]
pub struct Shape(fn(&mut Schemas) -> String);

impl Shape {
    /// That of `T`.
    pub const fn of<T: ToSchema + PartialSchema>() -> Self {
        Self(|all| {
            T::schemas(all);
            all.push((T::name().into_owned(), T::schema()));
            T::name().into_owned()
        })
    }
}

impl std::fmt::Debug for Shape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str((self.0)(&mut Vec::new()).as_str())
    }
}

/// The document as it is checked in.
pub const DOCUMENT: &str = include_str!("../openapi.json");

/// Makes the document.
pub fn document() -> Value {
    let mut schemas = Vec::new();
    let mut paths = Map::new();
    for route in ROUTES {
        let operations = paths.entry(route.path).or_insert_with(|| json!({}));
        operations[route.method.as_str().to_lowercase()] = operation(route, &mut schemas);
    }
    for shape in [Shape::of::<Problem>(), Shape::of::<Code>(), Shape::of::<StreamReset>()] {
        (shape.0)(&mut schemas);
    }
    let schemas: Map<String, Value> = schemas.into_iter().map(|(name, schema)| (name, json!(schema))).collect();
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "Virtward",
            "version": "1",
            "description": "The HTTP API of `virtward serve`. Fields and codes are added, never renamed or removed; \
                            readers ignore what they do not know. Times are RFC 3339 in UTC, sizes are bytes.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "security": [{"token": []}, {"session": []}],
        "tags": HEADINGS.map(|(name, help)| json!({"name": name, "description": help})),
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {
                "token": {"type": "http", "scheme": "bearer"},
                "session": {"type": "apiKey", "in": "cookie", "name": SESSION_COOKIE},
            },
            "responses": {
                "Problem": {
                    "description": "What failed, on what, and what to do next",
                    "content": {PROBLEM_JSON: {"schema": reference("Problem")}},
                },
            },
        },
    })
}

/// The document as text, as it is checked in.
pub fn text() -> String {
    let mut text = serde_json::to_string_pretty(&document()).unwrap_or_default();
    text.push('\n');
    text
}

fn reference(name: &str) -> Value {
    json!({"$ref": format!("#/components/schemas/{name}")})
}

type Schemas = Vec<(String, RefOr<Schema>)>;

fn operation(route: &Route, schemas: &mut Schemas) -> Value {
    let mut parameters: Vec<Value> = path_parameters(route.path);
    parameters.extend(route.query.iter().map(query_parameter));
    if route.method == Method::Post && route.path.starts_with(BASE) && route.access != Access::Anybody {
        let help = "Makes a repetition harmless: for 24 hours the same key with the same request is answered with what \
                    the first one made, and with another request with 422. 1 to 200 visible ASCII characters.";
        parameters.push(header(IDEMPOTENCY_KEY, help));
    }
    if route.method != Method::Get && route.access != Access::Anybody {
        parameters.push(header(CSRF_TOKEN, "Sessions only: the CSRF token from log-in or `whoami`."));
    }
    if route.name == "policy-put" {
        parameters.push(header("if-match", "Revision that it was read at; 0: there is none yet."));
    }
    let mut operation = json!({
        "operationId": route.name,
        "tags": [route.tag],
        "summary": route.summary,
        "description": description(route),
        "responses": {
            route.status.to_string(): response(route, schemas),
            "default": {"$ref": "#/components/responses/Problem"},
        },
    });
    if !parameters.is_empty() {
        operation["parameters"] = Value::Array(parameters);
    }
    if let Some(content) = content(&route.request, schemas) {
        operation["requestBody"] = json!({"required": true, "content": content});
    }
    if route.access == Access::Anybody {
        operation["security"] = json!([]);
    }
    if let Body::Either(_, second) = route.response {
        let schema = reference(&(second.0)(schemas));
        operation["responses"]["200"] =
            json!({"description": "Nothing was changed", "content": {"application/json": {"schema": schema}}});
    }
    operation
}

fn description(route: &Route) -> String {
    let role = match route.access {
        Access::Anybody => "Needs no log-in.".to_owned(),
        Access::Role(role) => format!("Role: {}.", json!(role).as_str().unwrap_or_default()),
    };
    format!("{} {role}", route.help).trim_start().to_owned()
}

fn response(route: &Route, schemas: &mut Schemas) -> Value {
    let mut response = json!({"description": route.summary});
    if let Some(content) = content(&route.response, schemas) {
        response["content"] = content;
    }
    response
}

fn content(body: &Body, schemas: &mut Schemas) -> Option<Value> {
    let schema = match body {
        Body::None => return None,
        Body::Text(kind @ "application/json") => return Some(json!({*kind: {"schema": {"type": "object"}}})),
        Body::Text(kind) => return Some(json!({*kind: {"schema": {"type": "string"}}})),
        Body::One(shape) | Body::Either(shape, _) => reference(&(shape.0)(schemas)),
        Body::List(shape) => json!({"type": "array", "items": reference(&(shape.0)(schemas))}),
        Body::Page(shape) => json!({
            "type": "object",
            "required": ["items"],
            "properties": {
                "items": {"type": "array", "items": reference(&(shape.0)(schemas))},
                "next": {"type": ["string", "null"], "description": "Cursor of the next page; null on the last one."},
                "total": {"type": ["integer", "null"], "description": "How many there are in all; null where \
                          counting would cost too much."},
                "missing": {"type": "array", "items": {"type": "string"}, "description": "Of a list that every node \
                            has its own part of: the nodes that did not answer."},
            },
        }),
    };
    Some(json!({"application/json": {"schema": schema}}))
}

fn path_parameters(path: &str) -> Vec<Value> {
    path.split('/')
        .filter_map(|part| part.strip_prefix('{')?.strip_suffix('}'))
        .map(|name| json!({"name": name, "in": "path", "required": true, "schema": {"type": "string"}}))
        .collect()
}

fn query_parameter(param: &Param) -> Value {
    json!({"name": param.name, "in": "query", "description": param.help, "schema": {"type": param.kind}})
}

fn header(name: &str, help: &str) -> Value {
    json!({"name": name, "in": "header", "description": help, "schema": {"type": "string"}})
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// With `UPDATE_OPENAPI=1` it is written anew.
    #[test]
    fn the_checked_in_document_is_what_the_code_says() {
        if std::env::var_os("UPDATE_OPENAPI").is_some() {
            std::fs::write(concat!(env!("CARGO_MANIFEST_DIR"), "/openapi.json"), text()).unwrap();
            return;
        }
        assert!(
            DOCUMENT == text(),
            "the API changed: UPDATE_OPENAPI=1 cargo test -p virtward-api, then review openapi.json"
        );
    }

    #[test]
    fn names_are_unique_and_every_reference_leads_somewhere() {
        let names: BTreeSet<&str> = ROUTES.iter().map(|route| route.name).collect();
        assert_eq!(names.len(), ROUTES.len());
        let routes: BTreeSet<_> = ROUTES.iter().map(|route| (route.method, route.path)).collect();
        assert_eq!(routes.len(), ROUTES.len());
        assert!(ROUTES.iter().all(|route| !route.summary.is_empty() && !route.tag.is_empty()));
        let document = document();
        let mut seen = 0;
        walk(&document, &mut |reference| {
            let target = document.pointer(reference.trim_start_matches('#'));
            assert!(target.is_some(), "{reference} leads nowhere");
            seen += 1;
        });
        assert!(seen > 50, "{seen} references");
    }

    fn walk(value: &Value, found: &mut dyn FnMut(&str)) {
        match value {
            Value::Object(map) => {
                if let Some(Value::String(reference)) = map.get("$ref") {
                    found(reference);
                }
                map.values().for_each(|value| walk(value, found));
            }
            Value::Array(list) => list.iter().for_each(|value| walk(value, found)),
            _ => {}
        }
    }
}
