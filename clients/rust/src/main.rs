//! `async-openai` as it comes from crates.io, against the server at the address that is the first argument: its types are stricter
//! than those of other clients, so that a field of another type, or an event that it does not know, is an error of its own.
//! `clients/test_rust.py` runs it with a model of random weights; whatever has a form was given it by the server.

use std::error::Error;

use async_openai::config::OpenAIConfig;
use async_openai::error::OpenAIError;
use async_openai::types::chat::{ChatCompletionMessageToolCalls, CreateChatCompletionRequest, FinishReason, Role};
use async_openai::types::completions::CreateCompletionRequest;
use async_openai::types::embeddings::CreateEmbeddingRequest;
use async_openai::types::responses::{CreateResponse, ResponseStreamEvent, Status};
use futures_util::StreamExt;
use serde_json::{Value, json};

type Client = async_openai::Client<OpenAIConfig>;
type Done = Result<(), Box<dyn Error>>;

/// What all chats have in common; `ignore_eos` is no field of this client, so that a schema says how long an answer is.
fn chat(model: &str, more: Value) -> CreateChatCompletionRequest {
    let mut fields = json!({"model": model, "messages": [{"role": "user", "content": "Hello there"}], "max_completion_tokens": 64,
                            "temperature": 1, "seed": 7});
    fields.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    serde_json::from_value(fields).expect("a request in the client's own types")
}

fn person() -> Value {
    let name = json!({"type": "string", "pattern": "^[a-z]{3,8}$"});
    let properties = json!({"name": name, "age": {"type": "integer", "minimum": 0, "maximum": 130}});
    json!({"type": "object", "properties": properties, "required": ["name", "age"], "additionalProperties": false})
}

fn is_person(text: &str) -> bool {
    let value: Value = serde_json::from_str(text).unwrap_or_default();
    value["name"].as_str().is_some_and(|name| (3..=8).contains(&name.len())) && value["age"].is_u64()
}

async fn models(client: &Client, model: &str) -> Done {
    let listed = client.models().list().await?;
    assert_eq!(listed.data.iter().map(|m| m.id.as_str()).collect::<Vec<_>>(), [model]);
    assert_eq!(client.models().retrieve(model).await?.id, model);
    Ok(())
}

async fn chats(client: &Client, model: &str) -> Done {
    let format = json!({"type": "json_schema", "json_schema": {"name": "person", "schema": person(), "strict": true}});
    let more = json!({"response_format": format, "n": 2, "logprobs": true, "top_logprobs": 2});
    let answer = client.chat().create(chat(model, more)).await?;
    assert_eq!((answer.choices.len(), answer.object.as_str()), (2, "chat.completion"));
    for choice in &answer.choices {
        assert_eq!((choice.message.role, choice.finish_reason), (Role::Assistant, Some(FinishReason::Stop)));
        assert!(is_person(choice.message.content.as_deref().unwrap_or_default()), "{choice:?}");
        let tokens = choice.logprobs.as_ref().and_then(|l| l.content.as_ref()).expect("logprobs");
        assert!(!tokens.is_empty() && tokens.iter().all(|t| t.logprob <= 0.0 && t.top_logprobs.len() == 2));
    }
    let usage = answer.usage.expect("usage");
    assert_eq!(usage.prompt_tokens + usage.completion_tokens, usage.total_tokens);
    // The same request as a stream is the same text.
    let format = json!({"type": "json_schema", "json_schema": {"name": "person", "schema": person(), "strict": true}});
    let request = json!({"response_format": format, "stream": true, "stream_options": {"include_usage": true}});
    let mut stream = client.chat().create_stream(chat(model, request)).await?;
    let (mut text, mut ends, mut usage) = (String::new(), Vec::new(), None);
    while let Some(chunk) = stream.next().await {
        let chunk = chunk?;
        for choice in chunk.choices {
            text += choice.delta.content.as_deref().unwrap_or_default();
            ends.extend(choice.finish_reason);
        }
        usage = chunk.usage.or(usage);
    }
    assert_eq!((Some(&text), ends), (answer.choices[0].message.content.as_ref(), vec![FinishReason::Stop]));
    assert!(usage.is_some_and(|u| u.completion_tokens > 0));
    Ok(())
}

async fn tools(client: &Client, model: &str) -> Done {
    let function =
        json!({"name": "remember", "description": "Remembers a person.", "parameters": person(), "strict": true});
    let call = json!({"tools": [{"type": "function", "function": function}], "tool_choice": "required", "parallel_tool_calls": false});
    let answer = client.chat().create(chat(model, call.clone())).await?;
    assert_eq!(answer.choices[0].finish_reason, Some(FinishReason::ToolCalls));
    let calls = answer.choices[0].message.tool_calls.as_deref().unwrap_or_default();
    let [ChatCompletionMessageToolCalls::Function(first)] = calls else { panic!("one call, got {calls:?}") };
    assert_eq!(first.function.name, "remember");
    assert!(is_person(&first.function.arguments), "{first:?}");

    let mut streamed = call.clone();
    streamed["stream"] = true.into();
    let mut stream = client.chat().create_stream(chat(model, streamed)).await?;
    let (mut ids, mut arguments) = (Vec::new(), String::new());
    while let Some(chunk) = stream.next().await {
        for part in chunk?.choices.into_iter().flat_map(|c| c.delta.tool_calls.unwrap_or_default()) {
            ids.extend(part.id);
            arguments += &part.function.and_then(|f| f.arguments).unwrap_or_default();
        }
    }
    assert_eq!((ids.len(), arguments.as_str()), (1, first.function.arguments.as_str()));

    // The call and its result go back as the client writes them.
    let messages = json!([{"role": "user", "content": "Who?"}, {"role": "assistant", "tool_calls": calls},
                          {"role": "tool", "tool_call_id": first.id, "content": "remembered"}]);
    let mut next = call;
    next["tool_choice"] = "none".into();
    next["messages"] = messages;
    next["max_completion_tokens"] = 4.into();
    let answer = client.chat().create(chat(model, next)).await?;
    assert!(answer.choices[0].message.tool_calls.is_none());
    Ok(())
}

async fn completions(client: &Client, model: &str) -> Done {
    let fields = json!({"model": model, "prompt": ["Once upon a time", "In the end"], "max_tokens": 8, "seed": 3, "logprobs": 2});
    let request: CreateCompletionRequest = serde_json::from_value(fields.clone())?;
    let answer = client.completions().create(request).await?;
    assert_eq!(answer.choices.iter().map(|c| c.index).collect::<Vec<_>>(), [0, 1]);
    assert!(answer.choices.iter().all(|c| c.logprobs.is_some()));
    let request: CreateCompletionRequest = serde_json::from_value(fields)?;
    let mut stream = client.completions().create_stream(request).await?;
    let mut texts = [String::new(), String::new()];
    while let Some(chunk) = stream.next().await {
        chunk?.choices.into_iter().for_each(|c| texts[c.index as usize] += &c.text);
    }
    assert_eq!(texts.to_vec(), answer.choices.into_iter().map(|c| c.text).collect::<Vec<_>>());
    Ok(())
}

async fn embeddings(client: &Client, model: &str) -> Done {
    let request = |more: Value| -> CreateEmbeddingRequest {
        let mut fields = json!({"model": model, "input": ["a text", "another"]});
        fields.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        serde_json::from_value(fields).expect("a request in the client's own types")
    };
    let floats = client.embeddings().create(request(json!({}))).await?;
    assert_eq!(floats.data.len(), 2);
    for of in &floats.data {
        let length = of.embedding.iter().map(|x| x * x).sum::<f32>().sqrt();
        assert!((length - 1.0).abs() < 1e-4, "an embedding has length {length}");
    }
    let packed = client.embeddings().create_base64(request(json!({"encoding_format": "base64"}))).await?;
    let unpacked: Vec<Vec<f32>> = packed.data.into_iter().map(|of| of.embedding.into()).collect();
    assert_eq!(unpacked, floats.data.into_iter().map(|of| of.embedding).collect::<Vec<_>>());
    Ok(())
}

async fn responses(client: &Client, model: &str) -> Done {
    let format = json!({"type": "json_schema", "name": "person", "schema": person(), "strict": true});
    let fields = json!({"model": model, "instructions": "Be brief.", "input": "Who?", "text": {"format": format}, "temperature": 0});
    let request: CreateResponse = serde_json::from_value(fields)?;
    let answer = client.responses().create(request.clone()).await?;
    let text = answer.output_text().unwrap_or_default();
    assert_eq!(answer.status, Status::Completed);
    assert!(is_person(&text), "{text}");
    let mut stream = client.responses().create_stream(CreateResponse { stream: Some(true), ..request }).await?;
    let (mut deltas, mut completed) = (String::new(), None);
    while let Some(event) = stream.next().await {
        match event? {
            ResponseStreamEvent::ResponseOutputTextDelta(of) => deltas += &of.delta,
            ResponseStreamEvent::ResponseCompleted(of) => completed = of.response.output_text(),
            _ => {}
        }
    }
    assert_eq!((deltas, completed), (text.clone(), Some(text)));
    Ok(())
}

async fn refusals(client: &Client, model: &str) -> Done {
    let refused = client.chat().create(chat("no-such-model", json!({}))).await;
    let Err(OpenAIError::ApiError(e)) = refused else { panic!("expected an error, got {refused:?}") };
    assert_eq!((e.status_code.as_u16(), e.api_error.code.as_deref()), (404, Some("model_not_found")));
    let refused = client.chat().create(chat(model, json!({"max_completion_tokens": 1_000_000}))).await;
    let Err(OpenAIError::ApiError(e)) = refused else { panic!("expected an error, got {refused:?}") };
    assert_eq!((e.status_code.as_u16(), e.api_error.code.as_deref()), (400, Some("context_length_exceeded")));
    Ok(())
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Done {
    let mut args = std::env::args().skip(1);
    let (url, model) = args.next().zip(args.next()).ok_or("expected the server's address and its model")?;
    let config = OpenAIConfig::new().with_api_base(format!("{url}/v1")).with_api_key("none");
    let client = Client::with_config(config);
    models(&client, &model).await?;
    chats(&client, &model).await?;
    tools(&client, &model).await?;
    completions(&client, &model).await?;
    embeddings(&client, &model).await?;
    responses(&client, &model).await?;
    refusals(&client, &model).await?;
    println!("models, chats, tools, completions, embeddings, responses and refusals are as async-openai expects");
    Ok(())
}
