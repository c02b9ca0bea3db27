//! `/openapi.json` names every route there is, and none that is not.

use std::collections::BTreeSet;

use crate::support::*;
use serde_json::Value;

/// Paths as the router's source names them, in OpenAPI's form.
fn routed() -> BTreeSet<String> {
    let source = include_str!("../../src/routes.rs");
    let paths = source.split(".route(").skip(1).map(|rest| rest.split('"').nth(1).expect("a path in quotes"));
    paths.map(|path| path.replace("{*", "{")).collect()
}

#[test]
fn the_document_is_that_of_the_routes() {
    let server = start();
    let reply = get(&server, "/openapi.json");
    assert_eq!((reply.status, reply.header("content-type")), (200, Some("application/json")));
    let document = reply.json();
    assert_eq!(document["openapi"], "3.1.0");
    assert_eq!(document["info"]["version"], env!("CARGO_PKG_VERSION"));
    let paths = document["paths"].as_object().unwrap();
    let documented: BTreeSet<String> = paths.keys().cloned().collect();
    assert_eq!(documented, routed());
    for (path, methods) in paths {
        let methods = methods.as_object().unwrap().keys().filter(|key| *key != "parameters");
        for method in methods {
            let mut client = Client::connect(server.addr());
            client.request(&method.to_uppercase(), &path.replace("{id}", "other"), &[], b"{}");
            let reply = client.reply();
            assert!(![404, 405].contains(&reply.status), "{method} {path} gave {}", reply.text());
        }
    }
}

/// Every reference in the document leads somewhere in it.
#[test]
fn references_lead_somewhere() {
    let document: Value = serde_json::from_str(include_str!("../../openapi.json")).unwrap();
    fn walk(value: &Value, document: &Value) -> usize {
        match value {
            Value::Object(map) => {
                if let Some(at) = map.get("$ref").and_then(Value::as_str) {
                    let pointer = at.strip_prefix('#').expect("a reference into the document");
                    assert!(document.pointer(pointer).is_some(), "{at} leads nowhere");
                    return 1;
                }
                map.values().map(|v| walk(v, document)).sum()
            }
            Value::Array(list) => list.iter().map(|v| walk(v, document)).sum(),
            _ => 0,
        }
    }
    assert!(walk(&document, &document) > 10);
}
