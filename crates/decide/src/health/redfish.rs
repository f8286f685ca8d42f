//! What a management controller says by Redfish (DMTF DSP0266): the `Status` of systems, memory, processors, drives,
//! sensors of temperature, fans and power supplies.
//!
//! A document is walked in full and not by its schema: whatever bears a `Status` with a `Health` counts, so that what a
//! vendor adds counts too. Health is the part's own; `HealthRollup` says what is below and is used only where nothing else is
//! told of that.

use serde_json::Value;

use super::{Level, Trouble};

/// How deep a document is followed.
const DEPTH_MAX: usize = 12;
/// Links that one document may name.
const LINKS_MAX: usize = 64;

/// Names of links that lead to what is looked at, from one document to the next. `Members` are of a collection.
const FOLLOWED: [&str; 12] = [
    "Systems",
    "Chassis",
    "Members",
    "Memory",
    "Processors",
    "Storage",
    "Drives",
    "Thermal",
    "Power",
    "ThermalSubsystem",
    "PowerSubsystem",
    "PowerSupplies",
];

/// The documents that one leads to: paths on the same server.
pub fn links(document: &Value) -> Vec<String> {
    let mut found = Vec::new();
    let Some(fields) = document.as_object() else { return found };
    for name in FOLLOWED {
        match fields.get(name) {
            Some(Value::Array(all)) => found.extend(all.iter().filter_map(link)),
            Some(one) => found.extend(link(one)),
            None => {}
        }
    }
    found.truncate(LINKS_MAX);
    found
}

fn link(value: &Value) -> Option<String> {
    let path = value.get("@odata.id")?.as_str()?;
    // Only documents of their own: what has a fragment is part of one that is read anyway.
    (path.starts_with("/redfish/") && !path.contains(['#', ' ', '\r', '\n'])).then(|| path.to_owned())
}

/// The troubles that a document tells of.
pub fn troubles(document: &Value) -> Vec<Trouble> {
    let mut found = Vec::new();
    walk(document, &[], 0, &mut found);
    found
}

fn walk(value: &Value, above: &[&str], depth: usize, found: &mut Vec<Trouble>) {
    if depth > DEPTH_MAX || found.len() >= super::TOLD_MAX {
        return;
    }
    match value {
        Value::Array(all) => all.iter().for_each(|one| walk(one, above, depth + 1, found)),
        Value::Object(fields) => {
            let text = |key: &str| fields.get(key).and_then(Value::as_str).filter(|text| !text.is_empty());
            let own = text("Name").or_else(|| text("MemberId")).or_else(|| text("Id"));
            let path: Vec<&str> = above.iter().copied().chain(own).collect();
            if let Some(trouble) = fields.get("Status").and_then(|status| judged(status, fields, &path)) {
                found.push(trouble);
            }
            for (name, inner) in fields.iter().filter(|(name, _)| !matches!(name.as_str(), "Status" | "Links" | "Oem"))
            {
                if inner.is_object() || inner.is_array() {
                    let named = own.map_or(vec![name.as_str()], |own| vec![own]);
                    walk(inner, &named, depth + 1, found);
                }
            }
        }
        _ => {}
    }
}

fn judged(status: &Value, fields: &serde_json::Map<String, Value>, path: &[&str]) -> Option<Trouble> {
    let word = |key: &str| status.get(key).and_then(Value::as_str);
    // A bay without a part, or a part that is switched off, is no trouble.
    if matches!(word("State"), Some("Absent" | "Disabled" | "UnavailableOffline")) {
        return None;
    }
    let level = match word("Health")? {
        "Critical" => Level::Critical,
        "Warning" => Level::Warning,
        _ => return None,
    };
    let reading = ["ReadingCelsius", "Reading"].iter().find_map(|key| fields.get(*key).and_then(Value::as_f64));
    let reading = reading.map(|value| format!(" ({value})")).unwrap_or_default();
    let word = if level == Level::Critical { "critical" } else { "warning" };
    Some(Trouble::new(level, &format!("{}: {word}{reading}", path.join(" "))))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn sensors_of_a_chassis() {
        let thermal = json!({
            "@odata.id": "/redfish/v1/Chassis/1/Thermal", "Name": "Thermal",
            "Temperatures": [
                {"Name": "CPU 1", "ReadingCelsius": 98, "Status": {"State": "Enabled", "Health": "Critical"}},
                {"Name": "Inlet", "ReadingCelsius": 22, "Status": {"State": "Enabled", "Health": "OK"}},
                {"Name": "CPU 2", "ReadingCelsius": null, "Status": {"State": "Absent", "Health": "Critical"}}
            ],
            "Fans": [{"Name": "Fan 3", "Reading": 900, "Status": {"State": "Enabled", "Health": "Warning"}}]
        });
        let told = super::super::sorted(troubles(&thermal));
        let told: Vec<&str> = told.iter().map(|trouble| trouble.text.as_str()).collect();
        assert_eq!(told, ["Thermal CPU 1: critical (98)", "Thermal Fan 3: warning (900)"]);
    }

    #[test]
    fn a_system_and_where_it_leads() {
        let system = json!({
            "@odata.id": "/redfish/v1/Systems/1", "Name": "System",
            "Status": {"State": "Enabled", "Health": "OK", "HealthRollup": "Critical"},
            "MemorySummary": {"TotalSystemMemoryGiB": 256, "Status": {"Health": "Critical"}},
            "Storage": {"@odata.id": "/redfish/v1/Systems/1/Storage"},
            "Memory": {"@odata.id": "/redfish/v1/Systems/1/Memory"},
            "Links": {"Chassis": [{"@odata.id": "/redfish/v1/Chassis/1"}]}
        });
        assert_eq!(links(&system), ["/redfish/v1/Systems/1/Memory", "/redfish/v1/Systems/1/Storage"]);
        assert_eq!(troubles(&system)[0].text, "System: critical");
        let elsewhere = json!({"Members": [
            {"@odata.id": "https://elsewhere/redfish/v1/Systems/1"}, {"@odata.id": "/redfish/v1/Systems/1#/Status"},
            {"@odata.id": "/etc/passwd"}, {"@odata.id": 1}, {"@odata.id": "/redfish/v1/Systems/2"}
        ]});
        assert_eq!(links(&elsewhere), ["/redfish/v1/Systems/2"]);
    }

    #[test]
    fn what_nobody_expects_is_no_trouble() {
        let mut deep = json!({"Status": {"Health": "Critical"}});
        for _ in 0..40 {
            deep = json!([{ "x": deep }]);
        }
        assert_eq!(troubles(&deep), []);
        for odd in [json!(null), json!([[], 1, "x"]), json!({"Status": "Critical"}), json!({"Status": {"Health": 3}})] {
            assert_eq!(troubles(&odd), []);
            assert_eq!(links(&odd), Vec::<String>::new());
        }
    }
}
