//! How deeply XML is nested, found out before anything parses it: parsers call themselves for each level, and a document of
//! opening tags alone would take all of the stack.

/// Deepest nesting of elements that is read: twice of what libvirt reads. Layers of a disk are nested too, at most 200.
pub const NESTING_MAX: usize = 512;

/// Whether elements are nested at most [`NESTING_MAX`] deep. Looks at tags only; everything else is for a parser to judge.
pub fn is_shallow(text: &str) -> bool {
    let (mut depth, mut rest) = (0usize, text);
    while let Some(at) = rest.find('<') {
        rest = &rest[at..];
        let end = if rest.starts_with("<!--") {
            end_of(rest, 4, "-->")
        } else if rest.starts_with("<![CDATA[") {
            end_of(rest, 9, "]]>")
        } else if rest.starts_with("<?") {
            end_of(rest, 2, "?>")
        } else {
            let end = end_of_tag(rest);
            let tag = &rest[..end.unwrap_or(rest.len())];
            if tag.starts_with("</") {
                depth = depth.saturating_sub(1);
            } else if !tag.ends_with("/>") {
                depth += 1;
            }
            end
        };
        if depth > NESTING_MAX {
            return false;
        }
        // Whatever does not end is where a parser stops too.
        let Some(end) = end else { break };
        rest = &rest[end..];
    }
    true
}

fn end_of(text: &str, from: usize, mark: &str) -> Option<usize> {
    text[from..].find(mark).map(|at| from + at + mark.len())
}

/// Attributes may hold what looks like the end.
fn end_of_tag(text: &str) -> Option<usize> {
    let mut quote = None;
    for (at, byte) in text.bytes().enumerate() {
        match (quote, byte) {
            (Some(open), byte) if byte == open => quote = None,
            (Some(_), _) => {}
            (None, b'"' | b'\'') => quote = Some(byte),
            (None, b'>') => return Some(at + 1),
            (None, _) => {}
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_nested_counts() {
        let nested = |n: usize| format!("{}{}", "<a>".repeat(n), "</a>".repeat(n));
        assert!(is_shallow(&nested(NESTING_MAX)));
        assert!(!is_shallow(&nested(NESTING_MAX + 1)));
        assert!(!is_shallow(&"<a>".repeat(100_000)));
        assert!(!is_shallow(&"<a b='/>'>".repeat(1000)) && !is_shallow(&"<a b=\"</a>\">".repeat(1000)));
        for flat in ["<a/>", "<a b='>'/>", "<!-- <a> -->", "<![CDATA[<a>]]>", "<?a <a>?>", "<a></a>", "<a"] {
            assert!(is_shallow(&flat.repeat(1000)), "{flat}");
        }
        for cut in ["", "<", "<!--", "<![CDATA[", "<?", "</", "<a b='"] {
            assert!(is_shallow(cut), "{cut}");
        }
    }
}
