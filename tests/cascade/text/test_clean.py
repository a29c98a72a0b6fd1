import pytest

from cascade.text import clean_caption

# expected values: DeepFloyd IF's own cleaning, run twice (BeautifulSoup 4.15, ftfy 6.3)
CASES = {
    "A photo of <person> at https://foo.com/bar": "a photo of person at",
    "see www.cats.org/now hello": "see hello",
    '<b>Bold</b> &amp; "quoted" &lt;i&gt;x': 'bold "quoted" x',
    "<script>x=1</script>y": "y",
    "@nick hello": "hello",
    "中文 cat": "cat",
    "long—dash – and ‐ minus": "long-dash - and - minus",
    "“hi” ‘there’ `x`": "hi\" 'there' \"x",
    "192.168.1.1 ip": "ip",
    "#12 #12345 1234567 sale": "sale",
    "a line\\nbreak": "a line break",
    "file.png image.jpeg pic": "pic",
    "***SALE*** [x] {y} | \\ / z": "sale x y z",
    "this-is-my-cute-cat": "this is my cute cat",
    "jc6640 jc6640vc 6640vc231 cat": "cat",
    "cat, free shipping, free download": "cat,",
    "click for more cats": "cats",
    "cat 800x600 12.5×3": "cat",
    "word : other": "word: other",
    "a,b.c/d": "a, b. c d",
    '"whole thing"': "whole thing",
    "ﬁne ｆｕｌｌ\u3000width ĳ": "fine full width ij",
    "cafe\u0301": "café",
    "x\x00y": "xy",
    "Woman firefighter: dark skin tone": "woman firefighter: dark skin tone",
    "": "",
}


@pytest.mark.parametrize(("caption", "expected"), CASES.items())
def test_as_deepfloyd(caption, expected):
    assert clean_caption(caption) == expected


def test_second_pass_matters():
    assert clean_caption("%2520cat") == "cat"  # one pass leaves "%20cat"
