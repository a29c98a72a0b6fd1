"use strict";
// Trials are shown in an order of the rater's own, and each rater sees some of the pairs mirrored; a vote
// names the set of the page's own numbering, so that neither matters to who counts it.
const $ = (id) => document.getElementById(id);
const page = JSON.parse($("page").textContent);
const sources = [...document.querySelectorAll("script.trial")];
const store = `blind-${page.page}`;
const MIRROR = { first: "second", second: "first" };

let state = { rater: "", place: 0, votes: {} }; // votes: trial -> question -> {answer, left}
let order = [];
let shown = null; // the trial on screen, and whether it is mirrored

/** What the browser keeps under a name, or null. */
function recall(name) {
  try {
    return JSON.parse(localStorage.getItem(name));
  } catch {
    $("unsaved").hidden = false;
    return null;
  }
}

function save() {
  try {
    localStorage.setItem(store, JSON.stringify(state.rater)); // whose name the page begins with next time
    localStorage.setItem(`${store}/${state.rater}`, JSON.stringify(state));
  } catch {
    $("unsaved").hidden = false;
  }
}

/** 32 bits of a text: FNV-1a, then the finaliser of MurmurHash3, so that every bit depends on every letter. */
function hash(text) {
  let h = 0x811c9dc5;
  for (const byte of new TextEncoder().encode(text)) h = Math.imul(h ^ byte, 0x01000193);
  h = Math.imul(h ^ (h >>> 16), 0x85ebca6b);
  h = Math.imul(h ^ (h >>> 13), 0xc2b2ae35);
  return (h ^ (h >>> 16)) >>> 0;
}

function begin() {
  order = sources
    .map((_, index) => [hash(`${state.rater}/${page.page}/order/${index}`), index])
    .sort((a, b) => a[0] - b[0] || a[1] - b[1])
    .map(([, index]) => index);
  state.place < order.length ? show() : finish();
}

function only(id) {
  for (const main of document.querySelectorAll("main")) main.hidden = main.id !== id;
  scrollTo(0, 0);
}

function show() {
  const trial = JSON.parse(sources[order[state.place]].textContent);
  const mirrored = page.sets === 2 && (hash(`${state.rater}/${trial.id}/side`) & 1) === 1;
  shown = { id: trial.id, mirrored };
  $("caption").firstChild.textContent = trial.text;
  const sets = mirrored ? trial.sets.toReversed() : trial.sets;
  $("sets").className = page.sets === 2 ? "pair" : "";
  $("sets").replaceChildren(...sets.map(drawSet));
  $("questions").style.setProperty("--questions", page.questions.length);
  $("questions").replaceChildren(...page.questions.map(drawQuestion));
  $("missing").textContent = "";
  $("back").disabled = state.place === 0;
  $("progress").value = answered();
  $("count").textContent = `${state.place + 1} of ${order.length}`;
  only("trial");
  $("caption").focus({ preventScroll: true });
}

function drawSet(uris, index) {
  const section = document.createElement("section");
  section.className = "set";
  if (page.sets === 2) {
    const heading = document.createElement("h2");
    heading.textContent = `Set ${index + 1}`;
    section.append(heading);
  }
  const grid = document.createElement("div");
  grid.style.setProperty("--columns", Math.min(uris.length, 4));
  uris.forEach((uri, place) => {
    const button = document.createElement("button");
    const picture = document.createElement("img");
    button.type = "button";
    picture.src = uri;
    picture.alt = `${page.sets === 2 ? `Set ${index + 1}, picture` : "Picture"} ${place + 1} of ${uris.length}`;
    button.append(picture);
    button.addEventListener("click", () => zoom(picture));
    grid.append(button);
  });
  section.append(grid);
  return section;
}

function drawQuestion(question, index) {
  const fieldset = document.createElement("fieldset");
  const legend = document.createElement("legend");
  const options = document.createElement("div");
  const vote = state.votes[shown.id]?.[question.id];
  options.className = "options";
  legend.textContent = page.questions.length > 1 ? `${index + 1}. ${question.text}` : question.text;
  for (const [value, words] of question.answers) {
    const label = document.createElement("label");
    const input = document.createElement("input");
    input.type = "radio";
    input.name = question.id;
    input.value = value;
    input.checked = vote !== undefined && canonical(vote.answer) === value;
    input.addEventListener("change", () => answer(question.id, value));
    label.append(input, words);
    options.append(label);
  }
  fieldset.append(legend, options);
  return fieldset;
}

/** From what stands on the screen to the page's numbering, and back. */
function canonical(value) {
  return shown.mirrored ? (MIRROR[value] ?? value) : value;
}

function answer(question, value) {
  state.votes[shown.id] ??= {};
  const vote = { answer: canonical(value) };
  if (page.sets === 2) vote.left = canonical("first");
  state.votes[shown.id][question] = vote;
  $("missing").textContent = "";
  $("progress").value = answered();
  save();
}

const complete = (id) => page.questions.every((question) => state.votes[id]?.[question.id] !== undefined);
const answered = () => Object.keys(state.votes).filter(complete).length;

function next() {
  const open = page.questions.find((question) => state.votes[shown.id]?.[question.id] === undefined);
  if (open !== undefined) {
    $("missing").textContent = `Still open: ${open.text}`;
    document.querySelector(`input[name="${open.id}"]`).focus();
    return;
  }
  move(1);
}

function move(step) {
  state.place = Math.max(0, state.place + step);
  save();
  state.place < order.length ? show() : finish();
}

function finish() {
  $("total").textContent = `You answered ${answered()} of ${order.length}.`;
  $("text").value = JSON.stringify(votes());
  only("end");
  document.querySelector("#end h1").focus();
}

function votes() {
  const list = Object.entries(state.votes).flatMap(([trial, answers]) =>
    Object.entries(answers).map(([question, vote]) => ({ trial, question, ...vote })),
  );
  return { page: page.page, run: page.run, rater: state.rater, votes: list };
}

function download() {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([JSON.stringify(votes(), null, 1)], { type: "application/json" }));
  link.download = `votes-${state.rater.replace(/[^\p{L}\p{N}]+/gu, "-")}-${page.page.slice(0, 8)}.json`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}

function zoom(picture) {
  const dialog = $("zoom");
  dialog.querySelector("img").src = picture.src;
  dialog.querySelector("img").alt = picture.alt;
  $("which").textContent = picture.alt;
  if (!dialog.open) dialog.showModal();
}

function turn(step) {
  const all = [...document.querySelectorAll("#sets img")];
  const place = all.findIndex((picture) => picture.alt === $("which").textContent);
  zoom(all[(place + step + all.length) % all.length]);
}

$("begin").addEventListener("submit", (event) => {
  event.preventDefault();
  const rater = $("rater").value.trim();
  if (rater === "") return;
  state = recall(`${store}/${rater}`) ?? { rater, place: 0, votes: {} };
  save();
  begin();
});
$("answers").addEventListener("submit", (event) => {
  event.preventDefault();
  next();
});
$("back").addEventListener("click", () => move(-1));
$("review").addEventListener("click", () => move(-1));
for (const id of ["save", "export"]) $(id).addEventListener("click", download);
$("previous").addEventListener("click", () => turn(-1));
$("following").addEventListener("click", () => turn(1));
$("close").addEventListener("click", () => $("zoom").close());
$("zoom").addEventListener("click", (event) => {
  if (event.target === $("zoom")) $("zoom").close();
});

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if ($("zoom").open) {
    if (event.key === "ArrowLeft") turn(-1);
    if (event.key === "ArrowRight") turn(1);
    return;
  }
  if ($("trial").hidden) return;
  const options = document.querySelectorAll("#questions input");
  if (/^[1-9]$/.test(event.key) && options[event.key - 1] !== undefined) options[event.key - 1].click();
  else if (event.key === "Backspace" && state.place > 0) move(-1);
  else if (event.key === "Enter" && event.target.tagName !== "BUTTON" && event.target.tagName !== "INPUT") next();
  else return;
  event.preventDefault();
});

$("rater").value = recall(store) ?? "";
only("start");
$("rater").focus();
