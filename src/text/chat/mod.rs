//! Turns conversations into prompts, and splits answers into reasoning, content and tool calls.

mod clock;
pub mod harmony;
mod instructions;
mod jinja;
mod message;
mod python_json;
pub mod reasoning;
mod render;
mod template;
mod tool_support;
pub mod tools;

pub use message::Message;
pub use render::RenderOptions;
pub use template::ChatTemplate;
