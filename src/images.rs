//! What a question is about: no image, one or several.

use nexus_data::Image;

/// One or several images, from `&image`, `&[image, ..]` or `&vec`; none for a question without a picture.
#[derive(Debug, Clone, Copy)]
pub struct Images<'a>(pub(crate) &'a [Image]);

impl<'a> From<&'a Image> for Images<'a> {
    fn from(image: &'a Image) -> Self {
        Self(std::slice::from_ref(image))
    }
}

impl<'a> From<&'a [Image]> for Images<'a> {
    fn from(images: &'a [Image]) -> Self {
        Self(images)
    }
}

impl<'a> From<&'a Vec<Image>> for Images<'a> {
    fn from(images: &'a Vec<Image>) -> Self {
        Self(images)
    }
}

impl<'a, const N: usize> From<&'a [Image; N]> for Images<'a> {
    fn from(images: &'a [Image; N]) -> Self {
        Self(images)
    }
}
