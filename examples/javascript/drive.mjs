// CHROMIUM=/usr/bin/chromium node drive.mjs URL: press the page's button in a headless browser and print what it made.

import puppeteer from "puppeteer-core";

const browser = await puppeteer.launch({ executablePath: process.env.CHROMIUM, args: ["--no-sandbox"] });
try {
  const page = await browser.newPage();
  const errors = [];
  page.on("pageerror", (error) => errors.push(String(error)));
  await page.goto(process.argv[2]);
  const failed = () => document.getElementById("state").textContent.startsWith("failed");
  await page.waitForFunction(() => /ready|failed/.test(document.getElementById("state").textContent));
  if (process.env.PP_FX_PROMPT) await page.$eval("#prompt", (box, text) => (box.value = text), process.env.PP_FX_PROMPT);
  if (!(await page.evaluate(failed))) await page.click("#run");
  await page.waitForFunction(() => {
    const state = document.getElementById("state");
    return state.dataset.done !== undefined || state.textContent.startsWith("failed");
  }, { timeout: 120000 });
  if (process.env.PP_FX_SHOT) await page.screenshot({ path: process.env.PP_FX_SHOT });
  const state = await page.$eval("#state", (line) => ({ tokens: line.dataset.done ?? "", state: line.textContent }));
  console.log(JSON.stringify({ ...state, text: await page.$eval("#text", (line) => line.textContent), errors }));
} finally {
  await browser.close();
}
