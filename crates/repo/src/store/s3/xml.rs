//! The few XML documents of the protocol. Parsers ignore what they do not know; entities and DTDs are refused.

use jiff::Timestamp;
use roxmltree::{Document, Node};
use virtward_model::xml::is_shallow;

/// A document that is not what the protocol says.
#[derive(Debug)]
pub struct Malformed;

fn root<'a>(document: &'a Document<'_>, name: &str) -> Result<Node<'a, 'a>, Malformed> {
    let root = document.root_element();
    if root.tag_name().name() == name { Ok(root) } else { Err(Malformed) }
}

fn parse(bytes: &[u8]) -> Result<Document<'_>, Malformed> {
    let text = std::str::from_utf8(bytes).ok().filter(|text| is_shallow(text)).ok_or(Malformed)?;
    Document::parse(text).map_err(|_| Malformed)
}

fn children<'a>(node: Node<'a, 'a>, name: &'static str) -> impl Iterator<Item = Node<'a, 'a>> {
    node.children().filter(move |child| child.is_element() && child.tag_name().name() == name)
}

fn text<'a>(node: Node<'a, 'a>, name: &'static str) -> Option<&'a str> {
    children(node, name).next().and_then(|child| child.text())
}

/// One object of a listing, by its full key.
#[derive(Debug, PartialEq, Eq)]
pub struct Object {
    pub key: String,
    pub bytes: u64,
    /// By the server's clock.
    pub modified: Timestamp,
}

/// One page of a listing.
#[derive(Debug)]
pub struct Page {
    pub objects: Vec<Object>,
    /// Where the next page begins.
    pub next: Option<String>,
}

/// `ListBucketResult`.
pub fn list(bytes: &[u8]) -> Result<Page, Malformed> {
    let document = parse(bytes)?;
    let root = root(&document, "ListBucketResult")?;
    let mut objects = Vec::new();
    for node in children(root, "Contents") {
        let key = text(node, "Key").ok_or(Malformed)?;
        objects.push(Object {
            key: key.to_owned(),
            bytes: text(node, "Size").and_then(|size| size.parse().ok()).ok_or(Malformed)?,
            modified: text(node, "LastModified").and_then(|time| time.parse().ok()).ok_or(Malformed)?,
        });
    }
    let next = match text(root, "IsTruncated") {
        Some("true") => Some(text(root, "NextContinuationToken").ok_or(Malformed)?.to_owned()),
        _ => None,
    };
    Ok(Page { objects, next })
}

/// `InitiateMultipartUploadResult`: the id of the upload.
pub fn upload_id(bytes: &[u8]) -> Result<String, Malformed> {
    let document = parse(bytes)?;
    text(root(&document, "InitiateMultipartUploadResult")?, "UploadId").map(str::to_owned).ok_or(Malformed)
}

/// An upload under way.
#[derive(Debug, PartialEq, Eq)]
pub struct Upload {
    pub key: String,
    pub id: String,
    pub initiated: Timestamp,
}

/// `ListMultipartUploadsResult`; uploads without a time are left out.
pub fn uploads(bytes: &[u8]) -> Result<Vec<Upload>, Malformed> {
    let document = parse(bytes)?;
    let one = |node| {
        let (key, id) = (text(node, "Key")?.to_owned(), text(node, "UploadId")?.to_owned());
        Some(Upload { key, id, initiated: text(node, "Initiated")?.parse().ok()? })
    };
    Ok(children(root(&document, "ListMultipartUploadsResult")?, "Upload").filter_map(one).collect())
}

/// `ListPartsResult`: when the last part arrived.
pub fn newest_part(bytes: &[u8]) -> Result<Option<Timestamp>, Malformed> {
    let document = parse(bytes)?;
    let parts = children(root(&document, "ListPartsResult")?, "Part");
    Ok(parts.filter_map(|node| text(node, "LastModified")?.parse().ok()).max())
}

/// `Error`.
#[derive(Debug, Default)]
pub struct Failure {
    pub code: String,
    pub message: String,
    pub region: Option<String>,
}

/// The `Error` document, if it is one.
pub fn failure(bytes: &[u8]) -> Option<Failure> {
    let document = parse(bytes).ok()?;
    let root = root(&document, "Error").ok()?;
    let short = |name| text(root, name).map(|text| text.chars().filter(|c| !c.is_control()).take(300).collect());
    Some(Failure {
        code: short("Code").unwrap_or_default(),
        message: short("Message").unwrap_or_default(),
        region: short("Region"),
    })
}

/// The body of a completion. Parts by number.
pub fn complete<'a>(parts: impl Iterator<Item = (u32, &'a str, Option<&'a str>)>) -> String {
    let mut out = "<CompleteMultipartUpload xmlns=\"http://s3.amazonaws.com/doc/2006-03-01/\">".to_owned();
    for (number, etag, sum) in parts {
        let etag = etag.replace('&', "&amp;").replace('<', "&lt;").replace('"', "&quot;");
        let sum = sum.map_or(String::new(), |sum| format!("<ChecksumSHA256>{sum}</ChecksumSHA256>"));
        out.push_str(&format!("<Part><PartNumber>{number}</PartNumber><ETag>{etag}</ETag>{sum}</Part>"));
    }
    out.push_str("</CompleteMultipartUpload>");
    out
}

/// The body of a change of retention.
pub fn retention(mode: &str, until: &str) -> String {
    format!(
        "<Retention xmlns=\"http://s3.amazonaws.com/doc/2006-03-01/\"><Mode>{mode}</Mode>\
         <RetainUntilDate>{until}</RetainUntilDate></Retention>"
    )
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn an_answer_of_nothing_but_opening_tags_is_malformed() {
        let bytes = "<ListBucketResult>".repeat(200_000);
        assert!(list(bytes.as_bytes()).is_err() && failure(bytes.as_bytes()).is_none());
    }

    #[test]
    fn listings_have_pages_and_odd_keys() {
        let text = "<?xml version=\"1.0\"?><ListBucketResult xmlns=\"http://s3.amazonaws.com/doc/2006-03-01/\">\
            <IsTruncated>true</IsTruncated>\
            <NextContinuationToken>a/b+c=</NextContinuationToken>\
            <Contents><Key>p/a &amp; b%20+c</Key><Size>7</Size><LastModified>2026-01-02T03:04:05.678Z</LastModified></Contents>\
            </ListBucketResult>";
        let page = list(text.as_bytes()).unwrap();
        assert_eq!(page.next.as_deref(), Some("a/b+c="));
        assert_eq!((&*page.objects[0].key, page.objects[0].bytes), ("p/a & b%20+c", 7));
        assert_eq!(page.objects[0].modified, "2026-01-02T03:04:05.678Z".parse().unwrap());
        assert!(list(b"<ListBucketResult><IsTruncated>true</IsTruncated></ListBucketResult>").is_err());
        assert!(list(b"<html/>").is_err() && list(b"").is_err() && list(b"\xff").is_err());
    }

    #[test]
    fn entities_are_refused() {
        let bomb = "<!DOCTYPE a [<!ENTITY b \"bbbb\">]><Error><Code>&b;</Code></Error>";
        assert!(failure(bomb.as_bytes()).is_none());
    }

    proptest! {
        #[test]
        fn anything_can_come(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = (list(&bytes), upload_id(&bytes), uploads(&bytes), newest_part(&bytes), failure(&bytes));
        }
    }
}
