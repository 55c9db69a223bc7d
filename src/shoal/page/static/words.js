// words.json has [English, Chinese]. Names that are searched for (events, keys, files) stay.

let table = {};
let language = "en";

export async function loadWords() {
  table = await (await fetch("/static/words.json")).json();
  const kept = localStorage.getItem("language");
  setLanguage(kept || (navigator.language.startsWith("zh") ? "zh" : "en"));
}

export function setLanguage(chosen) {
  language = chosen === "zh" ? "zh" : "en";
  document.documentElement.lang = language;
  for (const each of document.querySelectorAll("[data-word]")) each.textContent = word(each.dataset.word);
}

export function otherLanguage() {
  const other = language === "en" ? "zh" : "en";
  localStorage.setItem("language", other);
  setLanguage(other);
}

export function word(key, values = {}) {
  const text = table[key] ? table[key][language === "zh" ? 1 : 0] : key;
  return text.replace(/\{(\w+)\}/g, (_, name) => values[name]);
}

export function number(value, digits = 4) {
  if (value == null || Number.isNaN(value)) return "-";
  return new Intl.NumberFormat(language, { maximumSignificantDigits: digits }).format(value);
}

export function bytes(value) {
  if (!value) return value === 0 ? "0 B" : "-";
  const at = Math.min(4, Math.floor(Math.log2(value) / 10));
  return `${number(value / 1024 ** at, 3)} ${["B", "KiB", "MiB", "GiB", "TiB"][at]}`;
}

export function seconds(value) {
  if (value == null) return "-";
  if (value < 1) return `${number(value * 1000, 3)} ms`;
  if (value < 120) return `${number(value, 3)} s`;
  return value < 7200 ? `${number(value / 60, 3)} min` : `${number(value / 3600, 3)} h`;
}
