//! Messages of a conversation, the input of the whole pipeline: a role, and parts that are text or images in order.

use nexus_core::ImageEmbeds;

use crate::image::Image;

/// Who speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// The frame of the conversation; only useful as the first message.
    System,
    /// The person.
    User,
    /// The model.
    Assistant,
}

impl Role {
    /// The name in the chat template.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::System => "system",
            Self::User => "user",
            Self::Assistant => "assistant",
        }
    }

    /// The role of this name.
    pub(crate) fn from_name(name: &str) -> Option<Self> {
        [Self::System, Self::User, Self::Assistant].into_iter().find(|role| role.as_str() == name)
    }
}

/// One piece of a message.
#[allow(clippy::large_enum_variant, reason = "a prompt has few of them, and a box would be in the way of who matches")]
#[derive(Debug, Clone)]
pub enum Part {
    /// Text, used word for word. `<image>` in it marks the place of an image of the same message.
    Text(String),
    /// A picture.
    Image(Image),
    /// A picture that has been encoded, or that was predicted and is not drawn.
    Embeds(ImageEmbeds),
}

/// Embeddings are equal if their sizes and values are; those that cannot be read from their device equal none.
impl PartialEq for Part {
    fn eq(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Text(one), Self::Text(other)) => one == other,
            (Self::Image(one), Self::Image(other)) => one == other,
            (Self::Embeds(one), Self::Embeds(other)) => {
                let values = |embeds: &ImageEmbeds| embeds.values.clone().try_into_data().ok();
                one.grid == other.grid && values(one).is_some_and(|one| values(other) == Some(one))
            }
            _ => false,
        }
    }
}

/// One turn of a conversation.
///
/// Images stand where their part stands, unless the text of the message has `<image>` markers: then the images go to
/// the markers, first to first, and there must be as many markers as images.
#[derive(Debug, Clone, PartialEq)]
pub struct Message {
    /// Who speaks.
    pub role: Role,
    /// What is said, in order.
    pub parts: Vec<Part>,
}

impl Message {
    /// A message of the user that starts with this text.
    pub fn text(text: impl Into<String>) -> Self {
        Self::user().with_text(text)
    }

    /// An empty message of the user.
    pub fn user() -> Self {
        Self { role: Role::User, parts: Vec::new() }
    }

    /// An empty system message; as the first message it replaces the default one.
    pub fn system() -> Self {
        Self { role: Role::System, parts: Vec::new() }
    }

    /// An empty message of the model, to replay an earlier answer.
    pub fn assistant() -> Self {
        Self { role: Role::Assistant, parts: Vec::new() }
    }

    /// Adds a text after the parts so far.
    #[must_use]
    pub fn with_text(mut self, text: impl Into<String>) -> Self {
        self.parts.push(Part::Text(text.into()));
        self
    }

    /// Adds an image after the parts so far.
    #[must_use]
    pub fn with_image(mut self, image: Image) -> Self {
        self.parts.push(Part::Image(image));
        self
    }

    /// Adds the embeddings of an image after the parts so far.
    #[must_use]
    pub fn with_embeds(mut self, embeds: ImageEmbeds) -> Self {
        self.parts.push(Part::Embeds(embeds));
        self
    }

    /// How many images this message has, those that are embeddings included.
    pub fn num_images(&self) -> usize {
        self.parts.iter().filter(|part| !matches!(part, Part::Text(_))).count()
    }

    /// The images of this message that have pixels, in order.
    pub fn images(&self) -> impl Iterator<Item = &Image> {
        self.parts.iter().filter_map(|part| match part {
            Part::Image(image) => Some(image),
            Part::Text(_) | Part::Embeds(_) => None,
        })
    }

    /// The texts of this message, in order.
    pub fn texts(&self) -> impl Iterator<Item = &str> {
        self.parts.iter().filter_map(|part| match part {
            Part::Text(text) => Some(text.as_str()),
            Part::Image(_) | Part::Embeds(_) => None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_keep_their_order() {
        let image = Image::from_rgb8(1, 1, vec![1, 2, 3]).unwrap();
        let message = Message::text("a").with_image(image.clone()).with_text("b");
        assert_eq!(message.role, Role::User);
        assert_eq!(message.parts, [Part::Text("a".into()), Part::Image(image.clone()), Part::Text("b".into())]);
        assert_eq!(message.texts().collect::<Vec<_>>(), ["a", "b"]);
        assert_eq!(message.images().collect::<Vec<_>>(), [&image]);
    }

    #[test]
    fn embeddings_are_images_without_pixels() {
        let embeds = |value: f32| {
            let values = burn::tensor::Tensor::full([1, 2, 4], value, &nexus_core::testing::cpu());
            ImageEmbeds::new(values, nexus_core::GridThw { t: 1, h: 2, w: 4 }).unwrap()
        };
        let message = Message::text("a").with_embeds(embeds(1.0));
        assert_eq!((message.num_images(), message.images().count()), (1, 0));
        assert_eq!(message, Message::text("a").with_embeds(embeds(1.0)));
        assert_ne!(message, Message::text("a").with_embeds(embeds(2.0)));
    }

    #[test]
    fn roles_have_the_names_of_the_template() {
        for (message, name) in
            [(Message::system(), "system"), (Message::user(), "user"), (Message::assistant(), "assistant")]
        {
            assert_eq!(message.role.as_str(), name);
            assert_eq!(serde_json::to_string(&message.role).unwrap(), format!("\"{name}\""));
        }
    }
}
