//! `query-commands` and `query-qmp-schema`.
//!
//! Owns: the translation of the tables to SchemaInfo entities. Promises: every entity that is named
//! is listed once; type names are numbers, except of built-in types, commands and events, so that
//! clients follow references instead of names.

use std::collections::HashMap;
use std::collections::VecDeque;

use serde_json::{Map, Value, json};

use super::table::{COMMANDS, EVENTS};
use super::types::{AlternateType, EMPTY, EnumType, Member, ObjectType, Type};

/// Answer of `query-commands`.
pub fn query_commands() -> Value {
    COMMANDS.iter().map(|entry| json!({"name": entry.name})).collect()
}

/// Answer of `query-qmp-schema`.
pub fn query_qmp_schema() -> Value {
    let mut schema = Schema::default();
    let mut entities = Vec::new();
    for event in EVENTS {
        let data = schema.object_name(event.data);
        entities.push(json!({"name": event.name, "arg-type": data, "meta-type": "event"}));
    }
    for command in COMMANDS {
        let arguments = schema.object_name(command.arguments);
        let answer = schema.name(&command.answer);
        let mut entity = json!({
            "name": command.name, "ret-type": answer, "meta-type": "command",
            "arg-type": arguments,
        });
        add_features(&mut entity, command.features);
        entities.push(entity);
    }
    while let Some((name, reached)) = schema.queue.pop_front() {
        entities.push(schema.entity(name, reached));
    }
    Value::Array(entities)
}

/// A type that was referred to and needs an entity of its own.
#[derive(Clone, Copy)]
enum Reached {
    Builtin(&'static str),
    Enum(&'static EnumType),
    Object(&'static ObjectType),
    Alternate(&'static AlternateType),
    Array(&'static Type),
}

#[derive(Default)]
struct Schema {
    /// Numbers of types by address; builtins and arrays by their name.
    numbers: HashMap<*const (), String>,
    named: HashMap<String, ()>,
    queue: VecDeque<(String, Reached)>,
}

impl Schema {
    fn name(&mut self, ty: &'static Type) -> String {
        let (name, json_type) = match ty {
            Type::Str => ("str", "string"),
            Type::Bool => ("bool", "boolean"),
            Type::Null => ("null", "null"),
            Type::Number => ("number", "number"),
            Type::Any => ("any", "value"),
            Type::Int(_) => ("int", "int"),
            Type::Enum(words) => {
                return self.number(*words as *const EnumType, Reached::Enum(words));
            }
            Type::Object(object) => return self.object_name(object),
            Type::Alternate(choice) => {
                return self.number(*choice as *const AlternateType, Reached::Alternate(choice));
            }
            Type::Array(element) => {
                let name = format!("[{}]", self.name(element));
                self.once(name.clone(), Reached::Array(element));
                return name;
            }
        };
        self.once(name.to_owned(), Reached::Builtin(json_type));
        name.to_owned()
    }

    fn object_name(&mut self, object: &'static ObjectType) -> String {
        self.number(object as *const ObjectType, Reached::Object(object))
    }

    fn number<T>(&mut self, address: *const T, reached: Reached) -> String {
        let next = self.numbers.len();
        if let Some(name) = self.numbers.get(&address.cast()) {
            return name.clone();
        }
        let name = next.to_string();
        self.numbers.insert(address.cast(), name.clone());
        self.queue.push_back((name.clone(), reached));
        name
    }

    fn once(&mut self, name: String, reached: Reached) {
        if self.named.insert(name.clone(), ()).is_none() {
            self.queue.push_back((name, reached));
        }
    }

    fn entity(&mut self, name: String, reached: Reached) -> Value {
        match reached {
            Reached::Builtin(json_type) => {
                json!({"name": name, "json-type": json_type, "meta-type": "builtin"})
            }
            Reached::Enum(words) => {
                let members: Vec<Value> =
                    words.values.iter().map(|word| json!({"name": word})).collect();
                json!({
                    "name": name, "members": members, "meta-type": "enum", "values": words.values,
                })
            }
            Reached::Array(element) => {
                let element = self.name(element);
                json!({"name": name, "element-type": element, "meta-type": "array"})
            }
            Reached::Alternate(alternate) => {
                let members: Vec<Value> = alternate
                    .choices
                    .iter()
                    .map(|choice| json!({"type": self.name(choice)}))
                    .collect();
                json!({"name": name, "members": members, "meta-type": "alternate"})
            }
            Reached::Object(object) => self.object(name, object),
        }
    }

    fn object(&mut self, name: String, object: &'static ObjectType) -> Value {
        let members: Vec<Value> = object.members.iter().map(|member| self.member(member)).collect();
        let mut entity = json!({"name": name, "members": members, "meta-type": "object"});
        if let (Some(variants), Some(map)) = (&object.variants, entity.as_object_mut()) {
            let words = object.members.iter().find(|member| member.name == variants.tag);
            let words = match words.map(|member| member.ty) {
                Some(Type::Enum(words)) => words.values,
                _ => &[],
            };
            let cases: Vec<Value> = words
                .iter()
                .map(|word| {
                    let case = variants.cases.iter().find(|(name, _)| name == word);
                    let case = self.object_name(case.map_or(&EMPTY, |(_, case)| case));
                    json!({"case": word, "type": case})
                })
                .collect();
            map.insert("tag".to_owned(), variants.tag.into());
            map.insert("variants".to_owned(), cases.into());
        }
        add_features(&mut entity, object.features);
        entity
    }

    fn member(&mut self, member: &'static Member) -> Value {
        let mut entity = json!({"name": member.name, "type": self.name(&member.ty)});
        if let (true, Some(map)) = (member.optional, entity.as_object_mut()) {
            map.insert("default".to_owned(), Value::Null);
        }
        add_features(&mut entity, member.features);
        entity
    }
}

fn add_features(entity: &mut Value, features: &[&str]) {
    let map: Option<&mut Map<String, Value>> = entity.as_object_mut();
    if let (false, Some(map)) = (features.is_empty(), map) {
        map.insert("features".to_owned(), features.into());
    }
}
