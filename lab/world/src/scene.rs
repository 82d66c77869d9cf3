//! Scenes: what a picture of the world shows, and the words for it in both languages.

use serde::{Deserialize, Serialize};

use nexus_data::Language;

/// Form of an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[allow(missing_docs, reason = "the names say it")]
pub enum Shape {
    Circle,
    Square,
    Triangle,
    Cross,
}

/// Colour of an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[allow(missing_docs, reason = "the names say it")]
pub enum Colour {
    Red,
    Green,
    Blue,
    Yellow,
    Purple,
    Cyan,
    Orange,
    Black,
}

/// How much of its place an object fills.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Size {
    /// About 24 pixels.
    Small,
    /// About 42 pixels.
    Large,
}

/// How an object is filled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Texture {
    /// One colour.
    Solid,
    /// Stripes of the colour and a lighter one.
    Striped,
}

/// Colour behind everything.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[allow(missing_docs, reason = "the names say it")]
pub enum Background {
    White,
    Grey,
    Pink,
    Mint,
}

/// How all objects are drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Style {
    /// Fill alone.
    Flat,
    /// Every object has a dark outline.
    Outlined,
}

/// One of the 3x3 places, in reading order from 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Place(pub u8);

/// One thing in a scene.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the types say it")]
pub struct Object {
    pub shape: Shape,
    pub colour: Colour,
    pub size: Size,
    pub texture: Texture,
    pub place: Place,
}

/// What a picture shows.
///
/// Objects stand in the order of their places. At most two share a place: a large one, and a small one that lies on it
/// and follows it.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the types say it")]
pub struct Scene {
    pub background: Background,
    pub style: Style,
    pub objects: Vec<Object>,
}

impl Shape {
    /// All shapes.
    pub const ALL: [Self; 4] = [Self::Circle, Self::Square, Self::Triangle, Self::Cross];

    /// The word.
    pub fn name(self, language: Language) -> &'static str {
        let (english, chinese) = match self {
            Self::Circle => ("circle", "圆形"),
            Self::Square => ("square", "方形"),
            Self::Triangle => ("triangle", "三角形"),
            Self::Cross => ("cross", "十字"),
        };
        either(language, english, chinese)
    }

    pub(crate) fn plural(self) -> &'static str {
        match self {
            Self::Circle => "circles",
            Self::Square => "squares",
            Self::Triangle => "triangles",
            Self::Cross => "crosses",
        }
    }
}

impl Colour {
    /// All colours.
    pub const ALL: [Self; 8] =
        [Self::Red, Self::Green, Self::Blue, Self::Yellow, Self::Purple, Self::Cyan, Self::Orange, Self::Black];

    /// The word.
    pub fn name(self, language: Language) -> &'static str {
        let (english, chinese) = match self {
            Self::Red => ("red", "红色"),
            Self::Green => ("green", "绿色"),
            Self::Blue => ("blue", "蓝色"),
            Self::Yellow => ("yellow", "黄色"),
            Self::Purple => ("purple", "紫色"),
            Self::Cyan => ("cyan", "青色"),
            Self::Orange => ("orange", "橙色"),
            Self::Black => ("black", "黑色"),
        };
        either(language, english, chinese)
    }

    /// Red, green and blue.
    pub fn rgb(self) -> [u8; 3] {
        match self {
            Self::Red => [214, 30, 36],
            Self::Green => [24, 140, 50],
            Self::Blue => [28, 64, 214],
            Self::Yellow => [245, 210, 20],
            Self::Purple => [140, 40, 170],
            Self::Cyan => [20, 195, 220],
            Self::Orange => [245, 125, 15],
            Self::Black => [28, 28, 32],
        }
    }

    /// The colour that a mix of red, green and blue is a shade of: the nearest one.
    pub fn nearest(rgb: [u8; 3]) -> Self {
        let distance = |colour: Self| {
            let differences = colour.rgb().into_iter().zip(rgb).map(|(own, other)| u32::from(own.abs_diff(other)));
            differences.map(|difference| difference * difference).sum::<u32>()
        };
        Self::ALL
            .into_iter()
            .fold(Self::Red, |near, colour| if distance(colour) < distance(near) { colour } else { near })
    }
}

impl Size {
    /// The word.
    pub fn name(self, language: Language) -> &'static str {
        match self {
            Self::Small => either(language, "small", "小的"),
            Self::Large => either(language, "large", "大的"),
        }
    }
}

impl Background {
    /// All backgrounds.
    pub const ALL: [Self; 4] = [Self::White, Self::Grey, Self::Pink, Self::Mint];

    /// The word.
    pub fn name(self, language: Language) -> &'static str {
        let (english, chinese) = match self {
            Self::White => ("white", "白色"),
            Self::Grey => ("grey", "灰色"),
            Self::Pink => ("pink", "粉色"),
            Self::Mint => ("mint", "薄荷色"),
        };
        either(language, english, chinese)
    }

    /// Red, green and blue in the middle of the picture.
    pub fn rgb(self) -> [u8; 3] {
        match self {
            Self::White => [240, 240, 240],
            Self::Grey => [168, 168, 172],
            Self::Pink => [240, 196, 210],
            Self::Mint => [190, 232, 204],
        }
    }
}

impl Place {
    /// All places in reading order.
    pub const ALL: [Self; 9] = [Self(0), Self(1), Self(2), Self(3), Self(4), Self(5), Self(6), Self(7), Self(8)];

    /// The words.
    pub fn name(self, language: Language) -> &'static str {
        const ENGLISH: [&str; 9] =
            ["top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right"];
        const CHINESE: [&str; 9] = ["左上", "上方", "右上", "左边", "中间", "右边", "左下", "下方", "右下"];
        let at = usize::from(self.0) % 9;
        either(language, ENGLISH[at], CHINESE[at])
    }

    /// Row, from the top.
    pub fn row(self) -> u8 {
        self.0 / 3
    }

    /// Column, from the left.
    pub fn column(self) -> u8 {
        self.0 % 3
    }
}

/// Whether no training scene has this pair: one for each shape, all of different colours.
pub fn is_held_out(colour: Colour, shape: Shape) -> bool {
    (colour as usize + 3 * shape as usize) % 8 == 5
}

impl Scene {
    /// Whether a training scene never shows this.
    pub fn has_held_out(&self) -> bool {
        self.objects.iter().any(|object| is_held_out(object.colour, object.shape))
    }

    /// Puts the objects into the order of their places; the one on top of another stays behind it.
    pub(crate) fn sorted(mut self) -> Self {
        self.objects.sort_by_key(|object| (object.place, std::cmp::Reverse(object.size)));
        self
    }
}

pub(crate) fn either<T>(language: Language, english: T, chinese: T) -> T {
    match language {
        Language::English => english,
        Language::Chinese => chinese,
    }
}
