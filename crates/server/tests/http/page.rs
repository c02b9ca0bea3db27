//! The web page over a socket: types and policies of its files, that each file it names is there, and that it names no other
//! site. What it does in a browser is tested in `clients/`.

use std::collections::BTreeSet;

use crate::support::*;

const POLICY: [&str; 8] = [
    "default-src 'none'",
    "script-src 'self'",
    "style-src 'self'",
    "connect-src 'self'",
    "img-src 'self' data:",
    "base-uri 'none'",
    "form-action 'none'",
    "frame-ancestors 'none'",
];

/// A server without a model: the page is there while one is being loaded.
fn bare() -> apr_server::Server {
    apr_server::Server::bind("127.0.0.1", 0, apr_server::Settings::default()).unwrap()
}

fn asked(server: &apr_server::Server, method: &str, path: &str, headers: &[&str]) -> (u16, Vec<(String, String)>) {
    let mut client = Client::connect(server.addr());
    client.request(method, path, headers, b"");
    client.head()
}

/// The strings between quotes that begin with a prefix.
fn quoted<'a>(text: &'a str, prefix: &'a str) -> impl Iterator<Item = &'a str> {
    text.split('"').skip(1).step_by(2).filter(move |s| s.starts_with(prefix))
}

/// Every file that the page names, and those name in turn, with what is answered for it.
fn files(server: &apr_server::Server) -> Vec<(String, Reply)> {
    let (mut todo, mut seen, mut out) = (vec!["/".to_string()], BTreeSet::new(), Vec::new());
    while let Some(path) = todo.pop() {
        if !seen.insert(path.clone()) {
            continue;
        }
        let reply = get(server, &path);
        let text = reply.text();
        todo.extend(quoted(&text, "/page/").map(str::to_string));
        if path.ends_with(".js") {
            let modules = text.lines().filter(|l| l.starts_with("import ") || l.starts_with("} from "));
            let names = modules.flat_map(|l| quoted(l, "./").map(|name| format!("/page/{}", &name[2..])));
            todo.extend(names.collect::<Vec<_>>());
        }
        out.push((path, reply));
    }
    out
}

#[test]
fn every_file_that_is_named_is_there_with_its_type_and_policy() {
    let server = bare();
    let files = files(&server);
    assert!(files.len() >= 12, "the page names its scripts: {:?}", files.iter().map(|f| &f.0).collect::<Vec<_>>());
    for (path, reply) in files {
        let kind = match path.rsplit_once('.').map_or("html", |(_, end)| end) {
            "html" => "text/html; charset=utf-8",
            "css" => "text/css; charset=utf-8",
            "js" => "text/javascript; charset=utf-8",
            "svg" => "image/svg+xml",
            other => panic!("{path} is a {other}"),
        };
        assert_eq!((reply.status, reply.header("content-type")), (200, Some(kind)), "{path}");
        let policy = reply.header("content-security-policy").unwrap();
        assert_eq!(policy.split("; ").collect::<Vec<_>>(), POLICY, "{path}");
        assert_eq!(reply.header("x-content-type-options"), Some("nosniff"), "{path}");
        assert_eq!(reply.header("referrer-policy"), Some("no-referrer"), "{path}");
        assert_eq!(reply.header("cache-control"), Some("no-cache"), "{path}");
    }
}

#[test]
fn every_file_names_this_server_only_and_runs_nothing_inline() {
    for (path, reply) in files(&bare()) {
        let text = reply.text().replace("http://www.w3.org/2000/svg", "");
        for word in ["http://", "https://", "@import", "innerHTML", "outerHTML", "insertAdjacentHTML", "document.write"]
        {
            assert!(!text.contains(word), "{path} holds {word}");
        }
        for word in ["eval(", "new Function", "setTimeout(\"", "style=\"", "\"style\"", " onclick=\"", "javascript:"] {
            assert!(!text.contains(word), "{path} holds {word}");
        }
        let n_bytes = reply.body.len();
        assert!(n_bytes < 40_000, "{path} has {n_bytes} bytes");
    }
}

#[test]
fn what_a_browser_has_is_not_sent_again() {
    let server = bare();
    for path in ["/", "/page/app.js", "/favicon.ico"] {
        let first = get(&server, path);
        let tag = first.header("etag").unwrap();
        for known in [tag.to_string(), format!("\"other\", W/{tag}")] {
            let (status, headers) = asked(&server, "GET", path, &[&format!("if-none-match: {known}")]);
            assert_eq!(status, 304, "{path}");
            assert!(headers.iter().any(|(name, value)| name == "etag" && value == tag), "{path}");
        }
        assert_eq!(asked(&server, "GET", path, &["if-none-match: \"other\""]).0, 200, "{path}");
    }
    assert_ne!(get(&server, "/").header("etag"), get(&server, "/page/app.js").header("etag"));
}

#[test]
fn methods_and_names_that_are_not_the_pages_are_refused() {
    let server = bare();
    let (status, headers) = asked(&server, "HEAD", "/", &[]);
    assert_eq!(status, 200);
    let n: usize = headers.iter().find(|(name, _)| name == "content-length").unwrap().1.parse().unwrap();
    assert_eq!(n, get(&server, "/").body.len());
    assert_eq!(post(&server, "/", &serde_json::json!({})).status, 405);
    for path in ["/page/", "/page/none.js", "/page/..%2fsrc%2flib.rs", "/page/../src/lib.rs", "/page/app.js/x"] {
        let reply = get(&server, path);
        assert_eq!((reply.status, reply.header("content-type")), (404, Some("application/json")), "{path}");
    }
    assert_eq!(asked(&server, "GET", "/", &["origin: http://evil.example"]).0, 403);
}
