//! Types of arguments, answers and events, as data.
//!
//! Owns: the shapes a QMP type can have, and short constructors for tables of them. Promises:
//! everything is `'static` and immutable. Order of members is the order in which they are checked.

/// A type.
#[derive(Debug, Clone, Copy)]
pub enum Type {
    /// Text.
    Str,
    /// `true` or `false`.
    Bool,
    /// `null`.
    Null,
    /// A number with a fraction.
    Number,
    /// Any value at all.
    Any,
    /// A whole number of a width.
    Int(Int),
    /// One of fixed words.
    Enum(&'static EnumType),
    /// Named members.
    Object(&'static ObjectType),
    /// One of several types, told apart by their JSON kind.
    Alternate(&'static AlternateType),
    /// Any number of one type.
    Array(&'static Type),
}

/// Width and sign of a whole number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Int {
    /// Signed 64 bits.
    I64,
    /// Unsigned 64 bits; -1 is taken as the largest.
    U64,
    /// Unsigned 32 bits.
    U32,
    /// Unsigned 16 bits.
    U16,
    /// Unsigned 64 bits; on the command line with an optional suffix (k, M, G, T, P, E).
    Size,
}

/// A whole number in signed 64 bits, the usual one.
pub const INT: Type = Type::Int(Int::I64);

/// An enumeration.
#[derive(Debug)]
pub struct EnumType {
    /// Name in the documentation of QMP; shown in no answer.
    pub name: &'static str,
    /// The words it accepts.
    pub values: &'static [&'static str],
}

/// An object, or with `variants` a union.
#[derive(Debug)]
pub struct ObjectType {
    /// Name in the documentation of QMP; shown in no answer.
    pub name: &'static str,
    /// Members that are always possible.
    pub members: &'static [Member],
    /// Further members, chosen by the value of one member.
    pub variants: Option<Variants>,
    /// Named promises about the type that clients probe.
    pub features: &'static [&'static str],
}

/// A member of an object.
#[derive(Debug)]
pub struct Member {
    /// Its key.
    pub name: &'static str,
    /// Its type.
    pub ty: Type,
    /// Whether it may be left out.
    pub optional: bool,
    /// Named promises about the member, such as `unstable`.
    pub features: &'static [&'static str],
}

/// The cases of a union.
#[derive(Debug)]
pub struct Variants {
    /// Name of the member, an enumeration, that chooses.
    pub tag: &'static str,
    /// Value of the tag and the members it adds. A value that is not here adds none.
    pub cases: &'static [(&'static str, &'static ObjectType)],
}

/// A choice by JSON kind; at most one of each kind.
#[derive(Debug)]
pub struct AlternateType {
    /// Name that the refusal shows.
    pub name: &'static str,
    /// The choices.
    pub choices: &'static [Type],
}

/// Arguments or answer without members.
pub static EMPTY: ObjectType = object("q_empty", &[]);

/// An object without variants and features.
pub const fn object(name: &'static str, members: &'static [Member]) -> ObjectType {
    ObjectType { name, members, variants: None, features: &[] }
}

/// A union.
pub const fn union(
    name: &'static str,
    members: &'static [Member],
    tag: &'static str,
    cases: &'static [(&'static str, &'static ObjectType)],
) -> ObjectType {
    ObjectType { name, members, variants: Some(Variants { tag, cases }), features: &[] }
}

/// A member that must be there.
pub const fn need(name: &'static str, ty: Type) -> Member {
    Member { name, ty, optional: false, features: &[] }
}

/// A member that may be left out.
pub const fn may(name: &'static str, ty: Type) -> Member {
    Member { name, ty, optional: true, features: &[] }
}

/// A member that may be left out and may change or vanish in later versions.
pub const fn may_unstable(name: &'static str, ty: Type) -> Member {
    Member { name, ty, optional: true, features: &["unstable"] }
}

/// An enumeration.
pub const fn words(name: &'static str, values: &'static [&'static str]) -> EnumType {
    EnumType { name, values }
}
