//! `apr tokenize`: text into the model's tokens.

use std::io::{Read, Write};
use std::path::PathBuf;

use apr_engine::model_file::ModelFile;
use serde_json::json;

use crate::failure::{Done, Result};
use crate::print::{harmless, one_line};

#[derive(clap::Args)]
pub struct Args {
    /// A GGUF file, or demo
    model: PathBuf,
    /// The text; `-` reads it from standard input, as does leaving it out
    text: Option<String>,
    /// Read the text of control tokens as tokens
    #[arg(long)]
    special: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    /// Print ids only, on one line
    #[arg(long, conflicts_with = "json")]
    ids: bool,
}

pub fn run(args: Args) -> Result<Done> {
    let file = ModelFile::open(&args.model)?;
    let tokenizer = apr_engine::tokenizer_of(&file.gguf.metadata)?;
    let text = match &args.text {
        Some(text) if text != "-" => text.clone().into_bytes(),
        _ => {
            let mut text = Vec::new();
            std::io::stdin().lock().read_to_end(&mut text)?;
            text
        }
    };
    let ids = tokenizer.encode_bytes(&text, args.special);
    let mut out = std::io::BufWriter::new(std::io::stdout().lock());
    if args.json {
        let pieces: Vec<String> = ids.iter().map(|&id| tokenizer.piece(id)).collect();
        writeln!(out, "{}", one_line(&json!({"schema": "apr.tokenize/1", "tokens": ids, "pieces": pieces})))?;
    } else if args.ids {
        writeln!(out, "{}", ids.iter().map(u32::to_string).collect::<Vec<_>>().join(" "))?;
    } else {
        for id in ids {
            writeln!(out, "{id:>8}  {:?}", harmless(&tokenizer.piece(id)))?;
        }
    }
    out.flush()?;
    Ok(Done::Ok)
}
